# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""A step that can stop after every phase, so that its activations can be read and changed between two rounds.

The phases are those of every step. Only values that a later kernel reads from another place, or that no kernel stores, need
something here: keys and values, the activation of fch, and attention from given probabilities.
"""

from libc.string cimport memcpy, memset

from pygpt._kernels cimport Floats, Net, Row, State, Step, floats_of, micro, phases, store_keys_values


cdef class WatchedStep(Step):
    """A Step whose rounds end where run_to() says. Between two rounds, its caller may read and change what view() returns."""

    cdef Floats kept                # probs, fch_gelu
    cdef Floats minus_zero          # (1, F) a bias that changes no number, not even -0

    def prepare(self, list rows not None, Py_ssize_t active) -> None:
        """Check and take the rows of the next step, as Step does. No phase is selected yet."""
        Step.prepare(self, rows, active)
        self.last = 0
        self.state.ln_size = 0      # the workers share one ln, so that a change reaches all of them

    def keep(self, bint probs, bint fch) -> None:
        """Make room for the probabilities of one layer, and for fch apart from fch_gelu, if they are asked for."""
        cdef State* s = &self.state
        cdef Py_ssize_t F = self.weights.net.F
        cdef Py_ssize_t values = self.weights.net.NH * s.R * s.ldp * probs
        self.kept = Floats(1, values + s.R * s.fch_row * fch)
        s.probs = self.kept.data if probs else NULL
        s.fch_gelu = self.kept.data + values if fch else s.fch
        if fch and self.minus_zero is None:
            self.minus_zero = Floats(1, F)
            for i in range(F):
                self.minus_zero.data[i] = <float> -0.0

    @property
    def phases(self) -> int:
        """The number of phases of the prepared step."""
        return phases(&self.weights.net, &self.state)

    def run_to(self, Py_ssize_t stop, Py_ssize_t probs_layer) -> None:
        """Select the phases up to number `stop` for the next round. probs_layer: the layer that stores its probabilities."""
        self.first, self.last = self.last, stop
        self.state.probs_layer = probs_layer

    def view(self, name, Py_ssize_t layer):
        """Return the memory of a buffer, rows first, or a layer's vector. It is valid until the step ends."""
        cdef State* s = &self.state
        cdef const Net* net = &self.weights.net
        cdef Py_ssize_t R = s.R, C = net.C
        if name == "residual":
            return <float[:R, :C]> s.residual
        if name == "ln":
            return <float[:R, :C]> s.ln
        if name == "qkv":
            return <float[:R, :3 * C]> s.qkv
        if name == "probs":
            return <float[:net.NH, :R, :s.ldp]> s.probs
        if name == "atty":
            return <float[:R, :C]> s.atty
        if name == "proj":
            return <float[:R, :C]> s.proj
        if name == "fch":
            return <float[:R, :s.fch_row]> s.fch
        if name == "fch_gelu":
            return <float[:R, :s.fch_row]> s.fch_gelu
        if name == "logits":
            return self.logits
        return <float[:C]> floats_of(&net.w.attprojb if name == "attprojb" else &net.w.fcprojb, layer)

    def store_keys_values(self, Py_ssize_t layer) -> None:
        """Copy the keys and values of all rows from qkv to their caches again."""
        store_keys_values(&self.weights.net, &self.state, layer, 0, self.state.R, self.weights.net.C, 3 * self.weights.net.C)

    def activate(self, Py_ssize_t row) -> None:
        """Compute a row of fch_gelu from fch again."""
        cdef Py_ssize_t at = row * self.state.fch_row
        micro.add_bias_act[self.weights.net.activation](
            self.state.fch_gelu + at, self.state.fch + at, self.minus_zero.data, self.weights.net.F)

    def mix(self, Py_ssize_t layer, const unsigned char[:, ::1] changed not None) -> None:
        """Compute atty again as probs values, for each row and head that is not 0 in changed (R, NH)."""
        cdef State* s = &self.state
        cdef const Net* net = &self.weights.net
        cdef float* acc = s.scratch
        cdef Row* row
        cdef Py_ssize_t r, head
        for r in range(s.R):
            row = s.rows + r
            for head in range(net.NH):
                if changed[r, head]:
                    memset(acc, 0, net.HSp * sizeof(float))
                    micro.mix(acc, s.probs + (head * s.R + r) * s.ldp, s.ldp, 1,
                              row.values + (layer * net.NH + head) * row.capacity * net.HSp, net.HSp, 0, row.pos + 1)
                    memcpy(s.atty + r * net.C + head * net.HS, acc, net.HS * sizeof(float))
