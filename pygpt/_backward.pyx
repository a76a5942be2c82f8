# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""Training: the backward pass, AdamW and the gradient's norm, with the workers, kernels and activations of the forward pass.

Parts of this file:
  (a) kernels: each mirrors one of _kernels.pyx, in reverse order, with `d` names for gradients and the same (ith, nth);
  (b) backward: one function that every worker runs, from the last layer to the first, with native barriers between kernels;
  (c) norm and update: one pass over flat arrays;
  (d) TrainStep: a Step that keeps its activations and runs these parts on the workers.

Order of sums. A weight's gradient is a sum over rows in ascending order (batch by batch, position by position). It starts at
zero, or at the present gradient if accumulated. The work is split over outputs, so no worker adds to another's numbers, and the
bits do not depend on their number. An input's gradient is a sum over outputs, ascending. Both sums are sequential and use fused
multiply-add. Sums in a row (layernorm, softmax) use 16 lanes. wte's gradient adds the head's part, then the encoder's by row.

Source: llm.c, train_gpt2.c, gpt2_backward and gpt2_update."""

from libc.stdint cimport int32_t, uint32_t
from libc.string cimport memcpy, memset

from pygpt._kernels cimport (
    DATTENTION, DATTPROJ, DENCODER, DFC, DFCPROJ, DHEAD, DLN1, DLN2, DLNF, DLOGITS, DQKV, NORM, UPDATE,
    Floats, KeysValues, Net, Row, State, Step, Tensor, Tensors, Weights, adamw_numbers, barrier_reset, done, float32, floats_of,
    done_and_wait, forward, gemm_floats, micro, padded, score_scale, shard, share, trace_begin, trace_worker,
)

from .errors import ClosedError, InputError

cdef enum:
    NORM_BLOCK = 1 << 16      # values in one sum of squares
    SPAN_ROWS = 16            # queries in one tile of the attention
    SPAN_KEYS = 64            # keys whose gradients are computed together


cdef struct Back:             # the state of the backward pass
    Tensors d                 # each tensor's gradient, float32
    int add_to                # whether to add to the present gradients
    float dloss               # the gradient of every row's loss
    Py_ssize_t B, T, maxT
    float* dresidual          # (R, C) of the residual stream
    float* dinp               # (R, C) dlnf, then dln2, datty, dln1 of each layer
    float* dqkv               # (R, 3C)
    float* dfch               # (R, F of fch_row)
    const float* dlogits      # (R, V) gradients of the logits, instead of the loss's; or NULL
    float* dresiduals         # OUT (2L+1, R, C) of the input of each layernorm; or NULL
    float* scratch            # (nth, scratch_size) for micro.outer and the attention
    Py_ssize_t scratch_size


cdef struct Flat:             # the flat arrays: parameters, gradients, first and second moments
    float* p
    float* g
    float* m
    float* v
    Py_ssize_t size
    Py_ssize_t start, stop    # the slice that the round works on; start is a multiple of NORM_BLOCK
    double* squares           # the sum of squares of each block of NORM_BLOCK values

# ------------------------------------------------------------------------------------------------ (a) kernels


cdef void cross_entropy_backward(const Net* net, State* s, const Back* b, Py_ssize_t ith, Py_ssize_t nth) noexcept nogil:
    """dlogits = (softmax(logits) - [target]) dloss, in place of exp(logits - max), (R, V); 0 for -100. Rows are split.

    If the caller gave dlogits, these are copied instead."""
    cdef Py_ssize_t r, start, stop
    cdef float* row
    shard(s.R, ith, nth, &start, &stop)
    for r in range(start, stop):
        row = s.logits + r * s.logits_row
        if b.dlogits != NULL:
            memcpy(row, b.dlogits + r * net.V, net.V * sizeof(float))
            continue
        if s.targets[r] < 0:
            memset(row, 0, net.V * sizeof(float))
            continue
        micro.store_scaled(row, row, b.dloss / s.total[r], net.V)
        row[s.targets[r]] -= b.dloss


cdef void matmul_backward(
        const Back* b,
        float* dinp, Py_ssize_t ldi,        # OUT (R, K), a row every ldi values
        float* dweight,                     # OUT (N, K)
        float* dbias,                       # OUT (N,), or NULL
        const float* dout, Py_ssize_t ldo,  # IN  (R, N), a row every ldo values
        const float* inp, Py_ssize_t lda,   # IN  (R, K), a row every lda values
        const float* weight,                # IN  (N, K)
        const float* act_of,                # IN  (R, K) rows as dinp's: the inputs are the activation of these; or NULL
        int activation,                     # which one
        Py_ssize_t R, Py_ssize_t K, Py_ssize_t N, Py_ssize_t ith, Py_ssize_t nth) noexcept nogil:
    """dinp = dout weight, split over its columns; dweight (+)= dout^T inp and dbias (+)= sum of dout's rows, over outputs."""
    cdef Py_ssize_t start, stop, r
    cdef float* scratch = b.scratch + ith * b.scratch_size
    share(K, micro.panel, ith, nth, &start, &stop)
    micro.outer(dinp + start, ldi, dout, ldo, 1, weight + start, K, R, stop - start, N, 0, scratch)
    if act_of != NULL:
        for r in range(R):
            micro.act_backward[activation](dinp + r * ldi + start, act_of + r * ldi + start, stop - start)
    share(N, 16, ith, nth, &start, &stop)
    micro.outer(dweight + start * K, K, dout + start, 1, ldo, inp, lda, stop - start, K, R, b.add_to, scratch)
    if dbias != NULL:
        micro.add_rows(dbias + start, dout + start, ldo, R, stop - start, b.add_to)


cdef void layernorm_backward(
        const Net* net, State* s, const Back* b,
        Py_ssize_t index,                   # of all layernorms, as in the forward pass
        float* dweight, float* dbias,       # OUT (C,), (C,)
        const float* weight,                # IN  (C,)
        Py_ssize_t ith, Py_ssize_t nth) noexcept nogil:
    """dresidual += the gradient of this layernorm's input, from dinp, the gradient of its output. Rows are split.

    Also computes dweight and dbias. Channels are split."""
    cdef Py_ssize_t r, start, stop, C = net.C
    cdef const float* x = s.residual + index * s.residual_step
    cdef const float* stats = s.stats + 2 * index * s.R
    shard(s.R, ith, nth, &start, &stop)
    for r in range(start, stop):
        micro.layernorm_backward(b.dresidual + r * C, b.dinp + r * C, x + r * C, weight, stats + 2 * r, C)
        if b.dresiduals != NULL:
            memcpy(b.dresiduals + (index * s.R + r) * C, b.dresidual + r * C, C * sizeof(float))
    share(C, 16, ith, nth, &start, &stop)
    micro.layernorm_gains(dweight + start, dbias + start, b.dinp + start, x + start, stats, C, s.R, stop - start, b.add_to)


cdef Py_ssize_t attention_scratch(const Net* net, Py_ssize_t T) noexcept nogil:
    """Return the values of scratch memory that attend_backward() needs in addition to micro.outer's."""
    return T * (2 * padded(T) + 3 * net.HSp)


cdef void attend_backward(const Net* net, State* s, const Back* b, Py_ssize_t layer, Py_ssize_t pair,
                          float* scratch) noexcept nogil:
    """One head of one sequence: compute dq, dk and dv from datty, with the forward pass's probabilities computed again.

    With p = softmax(q k^T scale), out = p v:  dv = p^T dout,  dp = dout v^T,  ds = p (dp - dot(p, dp)) scale,
    dq = ds k,  dk = ds^T q. dq adds keys in ascending order, dk and dv add queries in ascending order. dot(dout, out) is the
    same number as dot(p, dp), but rounded differently from dp. If one key has nearly all the attention, dp - dot(dout, out)
    would be only rounding noise."""
    cdef Py_ssize_t batch = pair // net.NH, head = pair % net.NH, T = b.T, C = net.C, HS = net.HS, HSp = net.HSp
    cdef Py_ssize_t ldp = padded(T), first = batch * T, t, t0, rows
    cdef Row* row = s.rows + first
    cdef const float* keys = row.keys + (layer * net.NH + head) * row.capacity * HSp
    cdef const float* values = row.values + (layer * net.NH + head) * row.capacity * HSp
    cdef const float* qkv = s.qkv + layer * s.qkv_step + first * 3 * C + head * HS
    cdef const float* datty = b.dinp + first * C + head * HS
    cdef float* dqkv = b.dqkv + first * 3 * C + head * HS
    cdef float* room = scratch + attention_scratch(net, T)
    cdef float* p = scratch                                             # (T, ldp)
    cdef float* ds = p + T * ldp                                        # (T, ldp) dp, then ds
    cdef float* q = ds + T * ldp                                        # (T, HSp)
    cdef float* dout = q + T * HSp                                      # (T, HSp)
    cdef float* dq = dout + T * HSp                                     # (T, HSp)
    cdef float dot, total, scale = score_scale(net, layer)
    memset(q, 0, 3 * T * HSp * sizeof(float))
    for t in range(T):
        memcpy(q + t * HSp, qkv + t * 3 * C, HS * sizeof(float))
        memcpy(dout + t * HSp, datty + t * C, HS * sizeof(float))
    t0 = 0
    while t0 < T:
        rows = min(<Py_ssize_t> SPAN_ROWS, T - t0)
        gemm_floats(float32, p + t0 * ldp, ldp, q + t0 * HSp, HSp, rows, keys, t0 + rows, HSp)
        gemm_floats(float32, ds + t0 * ldp, ldp, dout + t0 * HSp, HSp, rows, values, t0 + rows, HSp)
        for t in range(t0, t0 + rows):
            total = micro.softmax(p + t * ldp, t + 1, scale, NULL)
            micro.store_scaled(p + t * ldp, p + t * ldp, <float> 1 / total, t + 1)
            memset(p + t * ldp + t + 1, 0, (ldp - t - 1) * sizeof(float))
            gemm_floats(float32, &dot, 1, p + t * ldp, ldp, 1, ds + t * ldp, 1, t + 1)
            micro.softmax_backward(ds + t * ldp, p + t * ldp, dot, scale, t + 1, ldp)
        micro.mix(dq + t0 * HSp, ds + t0 * ldp, ldp, rows, keys, HSp, 0, t0 + rows)
        t0 += rows
    for t in range(T):
        memcpy(dqkv + t * 3 * C, dq + t * HSp, HS * sizeof(float))
    t0 = 0
    while t0 < T:                                                       # only queries from t0 on use these keys
        rows = min(<Py_ssize_t> SPAN_KEYS, T - t0)
        micro.outer(dqkv + C + t0 * 3 * C, 3 * C, ds + t0 * ldp + t0, 1, ldp, q + t0 * HSp, HSp, rows, HS, T - t0, 0, room)
        micro.outer(dqkv + 2 * C + t0 * 3 * C, 3 * C, p + t0 * ldp + t0, 1, ldp, dout + t0 * HSp, HSp, rows, HS, T - t0, 0,
                    room)
        t0 += rows


cdef void attention_backward(const Net* net, State* s, const Back* b, Py_ssize_t layer, Py_ssize_t ith,
                             Py_ssize_t nth) noexcept nogil:
    """dqkv (R, 3C) from datty (R, C). Pairs of sequence and head are split."""
    cdef Py_ssize_t pair, start, stop
    shard(b.B * net.NH, ith, nth, &start, &stop)
    for pair in range(start, stop):
        attend_backward(net, s, b, layer, pair, b.scratch + ith * b.scratch_size)


cdef void encoder_backward(const Net* net, State* s, const Back* b, Py_ssize_t ith, Py_ssize_t nth) noexcept nogil:
    """dwte[token] += dresidual[r], after the head's part; dwpe[pos] (+)= dresidual[r]. Channels are split."""
    cdef Py_ssize_t r, t, start, stop, C = net.C
    cdef const float* row
    cdef float* dwte = floats_of(&b.d.wte, 0)
    cdef float* dwpe = floats_of(&b.d.wpe, 0)
    share(C, 16, ith, nth, &start, &stop)
    if not b.add_to:
        for t in range(b.maxT):
            memset(dwpe + t * C + start, 0, (stop - start) * sizeof(float))
    for r in range(s.R):
        row = b.dresidual + r * C + start
        micro.add_rows(dwte + s.rows[r].token * C + start, row, C, 1, stop - start, 1)
        micro.add_rows(dwpe + s.rows[r].pos * C + start, row, C, 1, stop - start, 1)

# ------------------------------------------------------------------------------------------------ (b) the backward pass


cdef void run_layer(const Net* net, State* s, const Back* b, int phase, Py_ssize_t l, Py_ssize_t ith,
                    Py_ssize_t nth) noexcept nogil:
    """Run worker ith's share of one phase of layer l, as run_phase() does in the forward pass."""
    cdef Py_ssize_t R = s.R, C = net.C
    cdef const Tensors* w = &net.w
    cdef const Tensors* d = &b.d
    cdef const float* ln1 = s.ln + 2 * l * s.ln_step
    cdef const float* ln2 = ln1 + s.ln_step
    cdef const float* atty = s.atty + l * s.atty_step
    cdef const float* fch = s.fch + l * s.fch_step
    cdef const float* fch_gelu = s.fch_gelu + l * s.fch_step
    if phase == DFCPROJ:
        matmul_backward(b, b.dfch, s.fch_row, floats_of(&d.fcprojw, l), floats_of(&d.fcprojb, l), b.dresidual, C,
                        fch_gelu, s.fch_row, floats_of(&w.fcprojw, l), fch, net.activation, R, net.F, C, ith, nth)
    elif phase == DFC:
        matmul_backward(b, b.dinp, C, floats_of(&d.fcw, l), floats_of(&d.fcb, l), b.dfch, s.fch_row,
                        ln2, C, floats_of(&w.fcw, l), NULL, 0, R, C, net.F, ith, nth)
    elif phase == DLN2:
        layernorm_backward(net, s, b, 2 * l + 1, floats_of(&d.ln2w, l), floats_of(&d.ln2b, l), floats_of(&w.ln2w, l), ith, nth)
    elif phase == DATTPROJ:
        matmul_backward(b, b.dinp, C, floats_of(&d.attprojw, l), floats_of(&d.attprojb, l), b.dresidual, C,
                        atty, C, floats_of(&w.attprojw, l), NULL, 0, R, C, C, ith, nth)
    elif phase == DATTENTION:
        attention_backward(net, s, b, l, ith, nth)
    elif phase == DQKV:
        matmul_backward(b, b.dinp, C, floats_of(&d.qkvw, l), floats_of(&d.qkvb, l), b.dqkv, 3 * C,
                        ln1, C, floats_of(&w.qkvw, l), NULL, 0, R, C, 3 * C, ith, nth)
    else:
        layernorm_backward(net, s, b, 2 * l, floats_of(&d.ln1w, l), floats_of(&d.ln1b, l), floats_of(&w.ln1w, l), ith, nth)


cdef int backward(const Net* net, State* s, const Back* b, const trace_worker* me) noexcept nogil:
    """Compute worker me.ith's share of all gradients from the kept activations. Return 1 if the step was aborted."""
    cdef Py_ssize_t R = s.R, C = net.C, start, stop
    cdef int layer, phase
    cdef float* dwte = floats_of(&b.d.wte, 0)
    cdef float* dwpe = floats_of(&b.d.wpe, 0)
    cdef float* dhead = floats_of(&b.d.head, 0)
    cdef Py_ssize_t kept = net.V * C if net.tied else 0                                       # the head's part of dwte
    trace_begin(me)
    cross_entropy_backward(net, s, b, me.ith, me.nth)                                           # dlogits (R, V)
    if done_and_wait(me, DLOGITS, 0):
        return 1
    shard(R * C, me.ith, me.nth, &start, &stop)
    memset(b.dresidual + start, 0, (stop - start) * sizeof(float))
    if not b.add_to:
        shard(dwpe - dwte - kept, me.ith, me.nth, &start, &stop)
        memset(dwte + kept + start, 0, (stop - start) * sizeof(float))   # wte's padding, or all of wte if it is not the head
    matmul_backward(b, b.dinp, C, dhead, NULL, s.logits, s.logits_row, s.ln + 2 * net.L * s.ln_step, C,
                    floats_of(&net.w.head, 0), NULL, 0, R, C, net.V, me.ith, me.nth)              # dlnf (R, C)
    if done_and_wait(me, DHEAD, 0):
        return 1
    layernorm_backward(net, s, b, 2 * net.L, floats_of(&b.d.lnfw, 0), floats_of(&b.d.lnfb, 0), floats_of(&net.w.lnfw, 0),
                       me.ith, me.nth)
    if done_and_wait(me, DLNF, 0):
        return 1
    for layer in range(<int> net.L - 1, -1, -1):
        for phase in range(DFCPROJ, DLN1 + 1):
            run_layer(net, s, b, phase, layer, me.ith, me.nth)
            if done_and_wait(me, phase, layer):
                return 1
    encoder_backward(net, s, b, me.ith, me.nth)                                                 # dwte, dwpe
    done(me, DENCODER, 0)
    return 0

# ------------------------------------------------------------------------------------------------ (c) norm and update


cdef void squares_of(const Flat* f, Py_ssize_t ith, Py_ssize_t nth) noexcept nogil:
    """squares[i] = the sum of the squares of block i of the gradients, for each block of the slice."""
    cdef Py_ssize_t i, start, stop, first = f.start // NORM_BLOCK
    shard((f.stop + NORM_BLOCK - 1) // NORM_BLOCK - first, ith, nth, &start, &stop)
    for i in range(first + start, first + stop):
        f.squares[i] = micro.square_sum(f.g + i * NORM_BLOCK, min(<Py_ssize_t> NORM_BLOCK, f.stop - i * NORM_BLOCK))


cdef void update(const Flat* f, adamw_numbers numbers, const double[:, ::1] spans, Py_ssize_t ith,
                 Py_ssize_t nth) noexcept nogil:
    """One step of AdamW on this worker's share of the slice. A span is (start, stop, decay)."""
    cdef Py_ssize_t i, start, stop, first, last
    share(f.stop - f.start, 16, ith, nth, &start, &stop)
    for i in range(spans.shape[0]):
        first, last = max(f.start + start, <Py_ssize_t> spans[i, 0]), min(f.start + stop, <Py_ssize_t> spans[i, 1])
        numbers.decay = <float> spans[i, 2]
        if first < last:
            micro.adamw(f.p + first, f.g + first, f.m + first, f.v + first, last - first, &numbers)

# ------------------------------------------------------------------------------------------------ (d) the step


cdef enum Task:               # the work of a round
    FORWARD, BACKWARD, SQUARES, ADAMW, STREAM


cdef class TrainStep(Step):
    """Run a batch forward to its losses, backward if the activations are kept, and update all parameters.

    Before a round, its caller calls a begin_...() method under the GIL. Then every worker calls the step."""

    cdef Back back
    cdef Flat flat
    cdef Task task
    cdef bint keeps                 # whether the activations of every layer are kept for backward()
    cdef Floats kept                # these activations, or one layer's
    cdef Floats moving              # the gradients of activations
    cdef Floats backward_scratch, all_logits
    cdef readonly Py_ssize_t rows   # the R of these buffers
    cdef Py_ssize_t trained         # rows with a target in the last forward pass, at least 1
    cdef list caches                # keys and values of the batch's sequences
    cdef object config
    cdef object views               # keeps the four flat arrays alive
    cdef readonly bytearray squares   # float64, of each block
    cdef const int32_t[:, ::1] targets
    cdef object seed                # keeps the caller's arrays alive: dlogits and dresiduals
    cdef const double[:, ::1] spans
    cdef adamw_numbers numbers
    cdef bint owed                  # whether worker 0 still has to begin its share of the update
    cdef Py_ssize_t unfinished      # unfinished shares of the update
    cdef readonly Py_ssize_t updates   # complete updates
    cdef readonly bint ready        # whether backward() has activations

    def __init__(self, Weights weights not None, Py_ssize_t nth, uint32_t spins, config, float[::1] parameters not None,
                 float[::1] gradients not None, float[::1] first not None, float[::1] second not None, *, bint keep):
        self.keeps = keep
        self.config = config
        self.views = (parameters, gradients, first, second)
        self.flat.p, self.flat.g, self.flat.m, self.flat.v = &parameters[0], &gradients[0], &first[0], &second[0]
        self.flat.size = parameters.shape[0]
        self.squares = bytearray(8 * ((self.flat.size + NORM_BLOCK - 1) // NORM_BLOCK))
        cdef double[::1] squares = memoryview(self.squares).cast("d")
        self.flat.squares = &squares[0]
        cdef const Tensor* w = <const Tensor*> &weights.net.w
        cdef Tensor* d = <Tensor*> &self.back.d
        for _, _, offset, _ in config.tensors(padded=True):
            if w.format != float32:
                raise InputError("weights to train must be float32: open the model with TrainableGPT2")
            d[0] = Tensor(<const char*> (&gradients[0] + <Py_ssize_t> offset), w.step, float32)
            w += 1
            d += 1
        if weights.net.tied:
            self.back.d.head = self.back.d.wte
        self.back.maxT = config.maxT
        self.caches = []

    def begin_forward(self, const int32_t[:, ::1] inputs not None, const int32_t[:, ::1] targets not None,
                      Py_ssize_t active) -> None:
        """Prepare the forward pass of a checked batch, both (B, T), on the first `active` workers."""
        cdef Py_ssize_t b, t, B = inputs.shape[0], T = inputs.shape[1]
        self.ready = False
        if self.weights.net.w.wte.data == NULL:
            raise ClosedError("the model is closed: open it again")
        if (B, T) != (self.back.B, self.back.T):
            self.caches = []
            self.back.B, self.back.T = B, T
        if not self.caches:
            self.caches = [KeysValues(self.weights, T) for _ in range(B)]
        self.task = FORWARD
        self.targets = targets
        self.state.targets = &targets[0, 0]
        self.trained = max(sum([targets[b, t] >= 0 for b in range(B) for t in range(T)]), 1)
        self.prepare([(inputs[b, t], self.caches[b], True) for b in range(B) for t in range(T)], active)

    def finish_forward(self) -> Floats:
        """Return the losses, (B, T)."""
        losses = Floats(self.back.B, self.back.T)
        memcpy(losses.data, self.state.losses, self.state.R * sizeof(float))
        self.keep = None
        self.ready = self.keeps
        return losses

    cdef _reserve(self, Py_ssize_t R):
        """Make room for the activations of R rows: of all layers, or of one layer if they are not kept."""
        cdef State* s = &self.state
        cdef Py_ssize_t C = self.weights.net.C, L = self.weights.net.L if self.keeps else 1
        cdef Py_ssize_t norms = 2 * L + 1 if self.keeps else 1
        if R == self.rows:
            return
        self.rows = 0
        self.kept = self.moving = self.all_logits = self.backward_scratch = None   # free the old ones first
        self._reserve_rows(R)
        s.fch_row = self.weights.net.F + 16
        self.kept = Floats(1, R * (2 * norms * C + L * (4 * C + 2 * s.fch_row) + C + 2 * norms + 2), dense=True)
        s.residual = self.kept.data
        s.ln = s.residual + norms * R * C
        s.qkv = s.ln + norms * R * C
        s.atty = s.qkv + L * R * 3 * C
        s.proj = s.atty + L * R * C
        s.fch = s.proj + R * C
        s.fch_gelu = s.fch + L * R * s.fch_row
        s.total = s.fch_gelu + L * R * s.fch_row
        s.losses = s.total + R
        s.logits_row = (self.weights.net.V + 127) // 128 * 128
        self.all_logits = Floats(R, s.logits_row, dense=True)
        s.logits = self.all_logits.data
        if self.keeps:
            s.stats = s.losses + R
            s.residual_step = s.ln_step = s.atty_step = R * C
            s.qkv_step, s.fch_step = R * 3 * C, R * s.fch_row
            self._reserve_backward(R)
        self.rows = R

    cdef _reserve_backward(self, Py_ssize_t R):
        """Make room for the gradients of activations and the scratch memory of the backward pass."""
        cdef State* s = &self.state
        cdef Py_ssize_t C = self.weights.net.C
        self.moving = Floats(1, R * (5 * C + s.fch_row), dense=True)
        self.back.dresidual = self.moving.data
        self.back.dinp = self.back.dresidual + R * C
        self.back.dqkv = self.back.dinp + R * C
        self.back.dfch = self.back.dqkv + R * 3 * C
        self.back.scratch_size = attention_scratch(&self.weights.net, self.back.T) + micro.outer_room
        self.backward_scratch = Floats(self.nth, self.back.scratch_size, dense=True)
        self.back.scratch = self.backward_scratch.data

    cdef _reserve_logits(self):
        """Do nothing: the logits stay in the step, which reuses their memory."""

    def begin_backward(self, bint accumulate, double scale, Py_ssize_t active, const float[:, ::1] dlogits=None,
                       float[:, :, ::1] out=None) -> None:
        """Prepare the gradients of scale * mean loss of the last forward pass, on the first `active` workers.

        dlogits: (R, V), the gradients to start from instead. out: (2L+1, R, C), for those of each layernorm's input."""
        if not self.ready:
            raise InputError("backward() was called without a forward() before it: call forward(), then backward() once")
        self.ready = False
        self.task, self.active = BACKWARD, active
        self.back.add_to = accumulate
        self.back.dloss = <float> (scale / self.trained)
        self.seed = dlogits, out
        self.back.dlogits = NULL if dlogits is None else &dlogits[0, 0]
        self.back.dresiduals = NULL if out is None else &out[0, 0, 0]
        barrier_reset(self.barrier, <uint32_t> active, self.spins)

    def begin_norm(self, Py_ssize_t start, Py_ssize_t stop, Py_ssize_t active) -> None:
        """Prepare the sums of squares of the blocks in a slice of the gradients, on the first `active` workers."""
        self.task, self.active, self.flat.start, self.flat.stop = SQUARES, active, start, stop

    def begin_update(self, numbers, const double[:, ::1] spans not None, Py_ssize_t active) -> None:
        """Prepare one step of AdamW with checked numbers (parameters.AdamW), on the first `active` workers.

        spans: rows (start, stop, decay), which follow each other. The parameters outside of them do not change."""
        cdef adamw_numbers* n = &self.numbers
        self.flat.start = self.flat.stop = 0
        if spans.shape[0]:
            self.flat.start, self.flat.stop = <Py_ssize_t> spans[0, 0], <Py_ssize_t> spans[spans.shape[0] - 1, 1]
        self.task, self.active, self.spans = ADAMW, active, spans
        n.lr, n.beta1, n.beta2, n.rest1, n.rest2 = numbers.lr, numbers.beta1, numbers.beta2, numbers.rest1, numbers.rest2
        n.over_correction1, n.over_correction2 = 1 / <double> numbers.correction1, 1 / <double> numbers.correction2
        n.eps, n.gradient_scale = numbers.eps, numbers.gradient_scale
        self.owed, self.unfinished = True, active

    def begin_stream(self) -> None:
        """Prepare a measurement: read and write the arrays as an update does, almost without computing. It destroys them."""
        self.task, self.active = STREAM, self.nth

    def __call__(self, Py_ssize_t ith, Py_ssize_t nth) -> None:
        """Run worker ith's share of this round, without the GIL. Repeated calls run worker 0's share of an update only once."""
        cdef Py_ssize_t start, stop
        cdef trace_worker me
        if ith >= self.active:
            return
        if self.task == ADAMW and ith == 0:
            if not self.owed:
                return
            self.owed = False   # from here on, signals cannot interrupt the share
        me = self._worker(ith)
        with nogil:
            if self.task == FORWARD:
                forward(&self.weights.net, &self.state, &me)
            elif self.task == BACKWARD:
                backward(&self.weights.net, &self.state, &self.back, &me)
            elif self.task == SQUARES:
                trace_begin(&me)
                squares_of(&self.flat, me.ith, me.nth)
                done(&me, NORM, 0)
            elif self.task == ADAMW:
                trace_begin(&me)
                update(&self.flat, self.numbers, self.spans, me.ith, me.nth)
                done(&me, UPDATE, 0)
            else:
                share(self.flat.size, 16, me.ith, me.nth, &start, &stop)
                micro.probe_stream(
                    self.flat.p + start, self.flat.g + start, self.flat.m + start, self.flat.v + start, stop - start)
        if self.task == ADAMW:
            self.unfinished -= 1   # safe under the GIL
            if self.unfinished == 0:
                self.updates += 1
