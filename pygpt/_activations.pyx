# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""A step that can stop after every phase, so that its activations can be read and changed between two rounds.

The phases are those of every step. Only values that a later kernel reads from another place, or that no kernel stores, need
something here: keys and values, the activation of fch, and attention from given probabilities.
"""

from libc.string cimport memcpy, memset

from pygpt._kernels cimport Floats, Net, Row, State, Step, floats_of, micro, phases, store_keys_values


cdef class WatchedStep(Step):
    """A Step whose rounds end where run_to() says. Between two rounds, its caller may read and change what view() returns."""

    cdef Floats kept                # fch_gelu, which other steps write over fch, and the probabilities of one layer

    def prepare(self, list rows not None, Py_ssize_t active) -> None:
        """Check and take the rows of the next step, as Step does. No phase is selected yet."""
        Step.prepare(self, rows, active)
        cdef State* s = &self.state
        cdef Py_ssize_t size = s.R * (s.fch_row + self.weights.net.NH * s.ldp)
        if self.kept is None or self.kept.shape[1] < size:
            self.kept = Floats(1, 2 * size)     # twice the need, as scratch
        s.fch_gelu = self.kept.data
        s.probs = s.fch_gelu + s.R * s.fch_row
        s.ln_size = 0                           # the workers share one ln, so that a change reaches all of them
        self.last = 0

    @property
    def phases(self) -> int:
        """The number of phases of the prepared step."""
        return phases(&self.weights.net, &self.state)

    def run_to(self, Py_ssize_t stop, Py_ssize_t probs_layer) -> None:
        """Select the phases up to number `stop` for the next round. probs_layer: the layer that stores its probabilities."""
        self.first, self.last = self.last, stop
        self.state.probs_layer = probs_layer

    def view(self, name, Py_ssize_t layer):
        """Return the memory of a buffer, (R, width) or (NH, R, ldp), or a layer's bias. It is valid until the step ends."""
        cdef State* s = &self.state
        cdef const Net* net = &self.weights.net
        if name == "probs":
            return <float[:net.NH, :s.R, :s.ldp]> s.probs
        if name == "logits":
            return self.logits
        place, rows, width = {
            "residual": (<size_t> s.residual, s.R, net.C), "ln": (<size_t> s.ln, s.R, net.C),
            "qkv": (<size_t> s.qkv, s.R, 3 * net.C), "atty": (<size_t> s.atty, s.R, net.C),
            "proj": (<size_t> s.proj, s.R, net.C),
            "fch": (<size_t> s.fch, s.R, s.fch_row), "fch_gelu": (<size_t> s.fch_gelu, s.R, s.fch_row),
            "attprojb": (<size_t> floats_of(&net.w.attprojb, layer), 1, net.C),
            "fcprojb": (<size_t> floats_of(&net.w.fcprojb, layer), 1, net.C),
        }[name]
        return <float[:rows, :width]> <float*> <size_t> place

    def store_keys_values(self, Py_ssize_t layer) -> None:
        """Copy the keys and values of all rows from qkv to their caches again."""
        store_keys_values(&self.weights.net, &self.state, layer, 0, self.state.R, self.weights.net.C, 3 * self.weights.net.C)

    def activate(self, rows) -> None:
        """Compute these rows of fch_gelu from fch again."""
        cdef const Net* net = &self.weights.net
        cdef Py_ssize_t row, width = self.state.fch_row
        cdef Floats zeros = Floats(1, net.F)
        memset(zeros.data, 0, net.F * sizeof(float))
        for row in rows:
            micro.add_bias_act[net.activation](
                self.state.fch_gelu + row * width, self.state.fch + row * width, zeros.data, net.F)

    def mix(self, Py_ssize_t layer, const unsigned char[:, ::1] changed not None) -> None:
        """Compute atty again as probs values, for each head and row that is not 0 in changed (NH, R)."""
        cdef State* s = &self.state
        cdef const Net* net = &self.weights.net
        cdef float* acc = s.scratch
        cdef Row* row
        cdef Py_ssize_t r, head
        for head in range(net.NH):
            for r in range(s.R):
                row = s.rows + r
                if changed[head, r]:
                    memset(acc, 0, net.HSp * sizeof(float))
                    micro.mix(acc, s.probs + (head * s.R + r) * s.ldp, s.ldp, 1,
                              row.values + (layer * net.NH + head) * row.capacity * net.HSp, net.HSp, 0, row.pos + 1)
                    memcpy(s.atty + r * net.C + head * net.HS, acc, net.HS * sizeof(float))
