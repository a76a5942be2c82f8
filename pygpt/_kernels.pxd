"""The structures that the forward pass moves through: dimensions and weights (Net), activations (State), one token (Row)."""

from libc.math cimport isfinite, sqrtf
from libc.stddef cimport ptrdiff_t
from libc.stdint cimport int32_t, int64_t, uint16_t, uint32_t, uint64_t


cdef extern from "micro.h" nogil:
    ctypedef struct adamw_numbers:
        float lr, beta1, beta2, rest1, rest2, over_correction1, over_correction2, eps, decay, gradient_scale

    ctypedef struct weight_matrix:
        const void* data
        ptrdiff_t N, K

    ctypedef struct weight_format:
        const char* name
        int block_values, value_bytes, scale_bytes, interleave, panel, narrow
        void (*gemm)(float*, ptrdiff_t, const float*, ptrdiff_t, ptrdiff_t,
                     const weight_matrix*, ptrdiff_t, ptrdiff_t, void*) noexcept nogil
        void (*pack_rows)(void*, const float*, ptrdiff_t, ptrdiff_t, ptrdiff_t) noexcept nogil
        void (*pack_weights)(void*, const weight_matrix*, ptrdiff_t, ptrdiff_t) noexcept nogil
        void (*product)(float*, ptrdiff_t, const void*, ptrdiff_t,
                        const weight_matrix*, ptrdiff_t, ptrdiff_t, const void*) noexcept nogil
        void (*widen)(float*, const weight_matrix*, ptrdiff_t) noexcept nogil
        int (*quantise)(void*, const weight_format*, const weight_matrix*, ptrdiff_t, ptrdiff_t, float*) noexcept nogil
        int (*probe)(ptrdiff_t) noexcept nogil
        int probe_operations

    ctypedef struct microkernels:
        const char* isa
        int fused
        const weight_format* const* formats
        void (*outer)(float*, ptrdiff_t, const float*, ptrdiff_t, ptrdiff_t, const float*, ptrdiff_t,
                      ptrdiff_t, ptrdiff_t, ptrdiff_t, int, float*) noexcept nogil
        void (*layernorm)(float*, const float*, const float*, const float*, float, ptrdiff_t, float*) noexcept nogil
        void (*add_bias)(float*, const float*, ptrdiff_t) noexcept nogil
        void (*add_bias_act[5])(float*, float*, const float*, ptrdiff_t) noexcept nogil
        void (*add_bias_residual)(float*, const float*, const float*, const float*, ptrdiff_t) noexcept nogil
        float (*softmax)(float*, ptrdiff_t, float, float*) noexcept nogil
        void (*mix)(float*, const float*, ptrdiff_t, ptrdiff_t, const float*, ptrdiff_t, ptrdiff_t, ptrdiff_t) noexcept nogil
        void (*store_scaled)(float*, const float*, float, ptrdiff_t) noexcept nogil
        void (*exps)(float*, const float*, float, ptrdiff_t) noexcept nogil
        void (*noise)(uint32_t*, uint32_t, const uint32_t*, uint32_t, uint32_t) noexcept nogil
        void (*add_rows)(float*, const float*, ptrdiff_t, ptrdiff_t, ptrdiff_t, int) noexcept nogil
        void (*act_backward[5])(float*, const float*, ptrdiff_t) noexcept nogil
        void (*layernorm_backward)(float*, const float*, const float*, const float*, const float*, ptrdiff_t) noexcept nogil
        void (*layernorm_gains)(float*, float*, const float*, const float*, const float*,
                                ptrdiff_t, ptrdiff_t, ptrdiff_t, int) noexcept nogil
        void (*softmax_backward)(float*, const float*, float, float, ptrdiff_t, ptrdiff_t) noexcept nogil
        void (*adamw)(float*, const float*, float*, float*, ptrdiff_t, const adamw_numbers*) noexcept nogil
        double (*square_sum)(const float*, ptrdiff_t) noexcept nogil
        int panel
        ptrdiff_t outer_room
        float (*probe_read)(const float*, ptrdiff_t, int) noexcept nogil
        float (*probe_fma)(ptrdiff_t) noexcept nogil
        double probe_flop
        void (*probe_stream)(float*, const float*, float*, float*, ptrdiff_t) noexcept nogil

    void gemm_floats(const weight_format* float32, float* out, ptrdiff_t ldo, const float* inp, ptrdiff_t ldi, ptrdiff_t rows,
                     const float* w, ptrdiff_t N, ptrdiff_t K)

    const microkernels *micro_baseline(), *micro_avx2(), *micro_avxvnni(), *micro_avx512(), *micro_avx512vnni()
    const microkernels *micro_avx512amx(), *micro_neon(), *micro_neondot()


cdef extern from "sync.h" nogil:
    ctypedef struct native_barrier:
        pass

    void barrier_reset(native_barrier*, uint32_t parties, uint32_t spins)
    void barrier_abort(native_barrier*)

    ctypedef struct work_pile:
        pass

    uint32_t take(work_pile*)


cdef extern from "trace.h" nogil:
    ctypedef struct trace_event:
        int32_t phase, layer
        int64_t begin_ns, end_ns, left_ns

    ctypedef struct trace_log:
        trace_event* events
        int64_t capacity, count, dropped, mark_ns
        int32_t stretched
        double stretch

    ctypedef struct trace_worker:
        ptrdiff_t ith, nth
        ptrdiff_t first, last
        native_barrier* barrier
        trace_log* log

    void trace_begin(const trace_worker*)
    void done(const trace_worker*, int32_t phase, int32_t layer)
    int done_and_wait(const trace_worker*, int32_t phase, int32_t layer)


cdef extern from "sampler.h" nogil:
    ptrdiff_t greedy_id(const float* logits, ptrdiff_t V)
    ctypedef void exps_function(float*, const float*, float, ptrdiff_t) noexcept nogil
    ctypedef struct sample_options:
        double temperature, top_p, min_p
        ptrdiff_t top_k
    ctypedef struct ranked:
        uint32_t id

    ptrdiff_t inverse_cdf_id(const float* logits, float* e, ptrdiff_t V, float coin, exps_function* exps)
    int sample_weights_of(float* e, const float* x, ptrdiff_t V, const sample_options*, ranked* order, ranked* spare,
                          exps_function* exps)
    ctypedef void noise_function(uint32_t*, uint32_t, const uint32_t*, uint32_t, uint32_t) noexcept nogil
    ctypedef struct noise_source:
        uint64_t seed, step
        uint32_t stream

    ctypedef struct unweighed:
        const float* x
        double max, temperature, min_p
        exps_function* exps
    ptrdiff_t race_id(const float* e, const unweighed*, ptrdiff_t V, const noise_source*, noise_function* noise)
    double natural_log(double x)
    float highest(const float* logits, ptrdiff_t V)
    double log_sum(const float* logits, float max, float* e, ptrdiff_t V, exps_function* exps)
    void rank_ids(ranked* order, ranked* spare, const float* x, ptrdiff_t V)


cdef enum Phase:              # the parts of a step, in the order of PHASES: forward, then training
    ENCODER, LN1, QKV, ATTENTION, ATTPROJ, LN2, FC, FCPROJ, LNF, LOGITS, LOSS, PACK
    DLOGITS, DHEAD, DLNF, DFCPROJ, DFC, DLN2, DATTPROJ, DATTENTION, DQKV, DLN1, DENCODER, NORM, UPDATE


cdef struct Tensor:           # one of the sixteen tensors, all layers' parts one after another
    const char* data
    Py_ssize_t step           # bytes from one layer's part to the next
    const weight_format* format    # float32 for all vectors


cdef struct Tensors:          # in the order of config.TENSORS, so that one loop fills them
    Tensor wte                # (V, C)
    Tensor wpe                # (maxT, C)
    Tensor ln1w, ln1b         # (L, C), (L, C)
    Tensor qkvw, qkvb         # (L, 3C, C), (L, 3C)
    Tensor attprojw, attprojb   # (L, C, C), (L, C)
    Tensor ln2w, ln2b         # (L, C), (L, C)
    Tensor fcw, fcb           # (L, F, C), (L, F)
    Tensor fcprojw, fcprojb   # (L, C, F), (L, C)
    Tensor lnfw, lnfb         # (C,), (C,)
    Tensor head               # (V, C), wte if it is tied


cdef struct Net:              # what is fixed: dimensions, variations and weights
    Py_ssize_t L, NH, C, HS, V, maxT, F
    int activation            # its number in micro.h
    float epsilon
    bint scaled, scaled_by_layer, tied
    Py_ssize_t HSp            # HS rounded up to a multiple of 16: the head size in a cache
    Tensors w


cdef struct Row:              # one token of one sequence
    Py_ssize_t token
    Py_ssize_t pos            # its position: how many keys lie before it
    Py_ssize_t capacity       # positions of its cache
    Py_ssize_t want           # its number among the rows whose logits are wanted, or -1
    float* keys               # (L, NH, capacity, HSp)
    float* values             # (L, NH, capacity, HSp)


cdef struct Span:             # neighbouring rows of one sequence: a tile of the attention
    Py_ssize_t start, stop    # rows
    Py_ssize_t W              # the number of its rows whose logits are wanted
    Py_ssize_t cost           # keys read by this span and by all spans before it


cdef struct State:            # changing: activations of R rows, with the names of llm.c
    Py_ssize_t R, W           # number of rows, number of rows whose logits are wanted
    Py_ssize_t n_spans
    Row* rows                 # (R,)
    Span* spans               # (n_spans,)
    Py_ssize_t* wanted        # (W,) ascending row numbers
    bint compact              # after its qkv, the last layer has only the wanted rows, one after another
    float* residual           # (R, C) the residual stream: encoded, residual2, residual3
    float* ln                 # (R, C) ln1, ln2, lnf, shared by the workers; or, for few rows, (R, C) for each worker
    Py_ssize_t fch_row        # values from one row of fch to the next: F and padding, so that rows use different cache sets
    Py_ssize_t ln_size        # values from one worker's ln to the next; 0 if the workers share one ln
    float* qkv                # (R, 3C)
    float* atty               # (R, C)
    float* proj               # (R, C) attproj, fcproj before they join the stream; in the encoder, rows of wpe
    float* fch                # (R, F of fch_row) fch
    float* fch_gelu           # (R, F of fch_row) the activation of fch: the same array, or another if activations are kept
    Py_ssize_t logits_row     # values from one row of logits to the next
    float* logits             # (W, V of logits_row)
    float* scratch            # (nth, scratch_size) for the attention, and for gemm
    Py_ssize_t scratch_size
    float* packed             # (R, max(F, C)) and padding: the rows of a product, packed; or NULL
    float* blocks             # (nth, block_size) each worker's packed weights; or NULL
    Py_ssize_t block_size
    work_pile* piles          # (L + 2, LAYER_PHASES) the next free block of each product
    Py_ssize_t ldp            # scores of a row: positions rounded up to a multiple of 16
    float* probs              # (NH, R, ldp) the probabilities of one layer's attention, or NULL
    Py_ssize_t probs_layer    # that layer
    # Set if activations are kept for a backward pass. Otherwise all steps are 0 (layers overwrite each other), the rest NULL.
    Py_ssize_t residual_step  # values from one version of the stream to the next, two a layer
    Py_ssize_t ln_step        # from ln1 to ln2 to the next layer's ln1
    Py_ssize_t qkv_step, atty_step, fch_step    # from one layer to the next
    float* stats              # (2L + 1, R, 2) mean and rstd of every layernorm
    const int32_t* targets    # (R,) the target ids of the loss
    float* total              # (R,) sum of exp(logits - max); the logits themselves become exp(logits - max)
    float* losses             # (R,)


cdef const microkernels* micro      # the table of the chosen instruction set
cdef const weight_format* float32   # the format of keys, values and vectors

cdef void shard(Py_ssize_t n, Py_ssize_t ith, Py_ssize_t nth, Py_ssize_t* start, Py_ssize_t* stop) noexcept nogil
cdef void share(Py_ssize_t n, Py_ssize_t unit, Py_ssize_t ith, Py_ssize_t nth, Py_ssize_t* start,
                Py_ssize_t* stop) noexcept nogil
cdef int forward(const Net* net, State* s, const trace_worker* me) noexcept nogil
cdef Py_ssize_t padded(Py_ssize_t n) noexcept nogil


cdef inline float score_scale(const Net* net, Py_ssize_t layer) noexcept nogil:
    """Return the factor of one layer's attention scores."""
    cdef float scale = <float> 1 / sqrtf(<float> net.HS) if net.scaled else 1
    return scale / <float> (layer + 1) if net.scaled_by_layer else scale


cdef inline float* floats_of(const Tensor* tensor, Py_ssize_t layer) noexcept nogil:
    """Return one layer's part of a float32 tensor."""
    return <float*> (tensor.data + layer * tensor.step)


cdef class Floats:
    cdef float* data
    cdef Py_ssize_t[2] shape
    cdef Py_ssize_t[2] strides
    cdef Py_ssize_t mapped          # the bytes of its own mapping, or 0 for memory of malloc()


cdef class Weights:
    cdef Net net
    cdef Weights kin                # the weights whose caches steps extend, or None for these
    cdef list kept                  # keeps the memory of the tensors
    cdef _place(self, Tensor* tensor, str name, Py_ssize_t layers, tuple shape, format, data)


cdef class KeysValues:
    cdef Floats keys
    cdef Floats values
    cdef Weights weights
    cdef readonly Py_ssize_t capacity
    cdef readonly Py_ssize_t length
    cdef Py_ssize_t ahead           # length plus the rows of the step in preparation


cdef class Trace:
    cdef Floats memory              # for each worker its log, then its events
    cdef readonly Py_ssize_t nth
    cdef readonly Py_ssize_t capacity
    cdef trace_log* log(self, Py_ssize_t ith) except NULL


cdef class Step:
    cdef Weights weights
    cdef State state
    cdef Floats shared              # the barrier, then the piles
    cdef Floats described           # rows, spans and wanted of the state
    cdef native_barrier* barrier
    cdef Py_ssize_t nth             # workers of the pool
    cdef Py_ssize_t active          # workers of the current step: numbers 0 to active - 1
    cdef uint32_t spins
    cdef Floats workspace
    cdef Floats scratch
    cdef Floats packed
    cdef Floats kept                # fch_gelu and probs of a watched step, or None
    cdef Py_ssize_t room            # capacity of the arrays in rows
    cdef list keep                  # caches of the current step: alive while the workers write to them
    cdef readonly Floats logits     # (W, V) of the current step
    cdef public Trace trace         # receives the workers' phases, or None
    cdef public bint forked         # whether workers return to the pool after every phase; a round is then one phase
    cdef Py_ssize_t first, last     # the phases of the current round
    cdef _reserve(self, Py_ssize_t R)
    cdef _reserve_rows(self, Py_ssize_t R)
    cdef _reserve_logits(self)
    cdef size_t _piles(self)
    cdef _reserve_scratch(self, Py_ssize_t longest)
    cdef _cut_spans(self)
    cdef trace_worker _worker(self, Py_ssize_t ith) except *
