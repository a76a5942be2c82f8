# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""All arithmetic of the network, and the SPMD forward pass.

How this file is built, from the inside out:
  (a) microkernels: C, one source compiled for each instruction set (micro_body.h), chosen once at import;
  (b) kernels: `cdef ... noexcept nogil`, one for each operation of GPT-2, which take (ith, nth) and do that worker's share;
  (c) forward: one function that every worker runs, layer by layer and kernel by kernel. The workers wait at a native
      barrier (sync.h) before a kernel reads the results of other workers;
  (d) classes: validated Python objects that own memory and enter (c) without the GIL.

Work is split over outputs, never inside a sum, so the bits do not depend on the number of workers. With one worker the
barriers are empty, and the program is serial. All checks run before `nogil` begins. So a worker cannot stop inside a step
and leave the others waiting.

Sources: Radford et al. 2019 (GPT-2); llm.c, train_gpt2.c, for the order of operations and the names."""

import os

from cpython.buffer cimport PyBUF_FORMAT, PyBUF_WRITE
from libc.stdlib cimport free
from libc.string cimport memcpy, memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.stdlib cimport posix_memalign

from .config import ACTIVATIONS
from .errors import ClosedError, InputError, shown, whole

cdef extern from *:
    """
    #include <sys/mman.h>
    enum { huge_page = 1 << 21 };
    static void ask_huge_pages(void *memory, size_t size) {
    #if defined(MADV_HUGEPAGE)
        (void)madvise(memory, size, MADV_HUGEPAGE); /* if the system lacks huge pages, it uses small pages */
    #else
        (void)memory, (void)size;
    #endif
    }"""
    enum:
        huge_page             # bytes, on systems with huge pages
    void ask_huge_pages(void* memory, size_t size) noexcept nogil

cdef extern from "Python.h":
    object PyMemoryView_FromMemory(char* memory, Py_ssize_t size, int flags)

cdef extern from "blocks.h" nogil:
    void panels_of_blocks(char* out, const char* blocks, int bits, ptrdiff_t N, ptrdiff_t K, ptrdiff_t start, ptrdiff_t stop)

# ------------------------------------------------------------------------------------------------ (a) instruction set


def _available() -> dict:
    """Map the name of each available instruction set to the address of its table, best first."""
    cdef const microkernels* found
    names = {}
    for address in (
        <size_t> micro_avx512amx(), <size_t> micro_avx512vnni(), <size_t> micro_avx512(), <size_t> micro_avxvnni(),
        <size_t> micro_avx2(), <size_t> micro_neondot(), <size_t> micro_neon(), <size_t> micro_baseline(),
    ):
        found = <const microkernels*> <size_t> address
        if found != NULL:
            names[found.isa.decode()] = address
    return names


def select_isa(name=None) -> None:
    """Choose the named instruction set, or by default the best one. Raises InputError if the set is not available."""
    global micro, float32
    available = _available()
    if name is None:
        name = next(iter(available))
    if name not in available:
        raise InputError(f"instruction set {name!r} is not available: this processor and build have {', '.join(available)}")
    micro = <const microkernels*> <size_t> available[name]
    float32 = micro.formats[0]


def weight_formats() -> dict:
    """Map the name of each weight format to (values, bytes) of a block."""
    cdef const weight_format* const* format = micro.formats
    found = {}
    while format[0] != NULL:
        found[format[0].name.decode()] = format[0].block_values, format[0].value_bytes + format[0].scale_bytes
        format += 1
    return found


cdef const weight_format* format_named(name) except NULL:
    """Find a format's row in the chosen instruction set's table. Raises InputError for an unknown name."""
    names = list(weight_formats())
    if name not in names:
        raise InputError(f"weights are of format {shown(name)}: the kernels read {', '.join(names)}")
    return micro.formats[<Py_ssize_t> names.index(name)]


def cpu_info() -> dict:
    """Return the chosen instruction set and the reason: keys isa, fused, available, reason."""
    forced = os.environ.get("PYGPT_ISA")
    return {
        "isa": micro.isa.decode(),
        "fused": bool(micro.fused),
        "available": list(_available()),
        "reason": f"PYGPT_ISA={forced}" if forced else "the widest that this processor and build have",
    }


select_isa(os.environ.get("PYGPT_ISA") or None)

# ------------------------------------------------------------------------------------------------ (b) kernels

cdef enum:
    SPAN_ROWS = 20        # rows of one attention tile
    FEW_ROWS = 4          # each worker normalises all of at most so many rows: a barrier would cost more
    BLOCK_BYTES = 5 << 17  # of weights packed at a time: they stay in the second-level cache while the rows pass
    BAND_ROWS = 16        # of a product between epilogues: the outputs are still in cache
    SHARES = 4            # blocks of a large product for each worker: a delayed worker takes fewer blocks

cdef enum Epilogue:
    NOTHING
    BIAS_KEYS_VALUES  # out += bias; keys and values go to the caches
    BIAS_ACTIVATION   # after = activation(out + bias); if after and out are different arrays, out += bias
    BIAS_RESIDUAL     # after = before + (out + bias)

cdef struct Product:      # out = inp weight^T, then the epilogue
    float* out            # OUT (rows, N), a row every ldo values
    Py_ssize_t ldo
    const float* inp      # IN  (rows, K), a row every ldi values
    Py_ssize_t ldi
    Tensor weight         # IN  (N, K)
    const float* bias     # IN  (N,) or NULL
    Py_ssize_t rows, K, N
    Epilogue epilogue
    const float* before   # IN  (rows, N) or NULL
    const Py_ssize_t* rows_before   # IN (rows,) ascending row numbers in `before`, or NULL for all rows in order
    float* after          # OUT (rows, N) or NULL; for an activation a row every ldo values
    Py_ssize_t layer


PHASES = (  # the parts of a step, in the order of Phase
    "encoder", "ln1", "qkv", "attention", "attproj", "ln2", "fc", "fcproj", "lnf", "logits",  # forward
    "loss", "pack",                                                                            # "pack": a part of products
    "dlogits", "dhead", "dlnf",                                                                # training, _backward.pyx
    "dfcproj", "dfc", "dln2", "dattproj", "dattention", "dqkv", "dln1", "dencoder", "norm", "update",
)

cdef enum:
    LAYER_PHASES = LNF - LN1


cdef void shard(Py_ssize_t n, Py_ssize_t ith, Py_ssize_t nth, Py_ssize_t* start, Py_ssize_t* stop) noexcept nogil:
    """Find worker ith's share [start, stop) of n items, split into equal contiguous parts."""
    start[0] = n * ith // nth
    stop[0] = n * (ith + 1) // nth


cdef void share(Py_ssize_t n, Py_ssize_t unit, Py_ssize_t ith, Py_ssize_t nth, Py_ssize_t* start,
                Py_ssize_t* stop) noexcept nogil:
    """Find worker ith's share as shard() does, but in whole units of items."""
    shard((n + unit - 1) // unit, ith, nth, start, stop)
    start[0] = min(start[0] * unit, n)
    stop[0] = min(stop[0] * unit, n)


cdef inline Tensor part(const Tensor* tensor, Py_ssize_t layer) noexcept nogil:
    """Return one layer's part of a tensor."""
    return Tensor(tensor.data + layer * tensor.step, tensor.step, tensor.format)


cdef inline Py_ssize_t bytes_of(const weight_format* format, Py_ssize_t rows, Py_ssize_t K) noexcept nogil:
    """Return the bytes of a matrix (rows, K): whole groups of rows, whole blocks, and scales padded to 64 bytes."""
    cdef Py_ssize_t groups = (rows + format.interleave - 1) // format.interleave
    cdef Py_ssize_t blocks = groups * format.interleave * ((K + format.block_values - 1) // format.block_values)
    return blocks * format.value_bytes + (blocks * format.scale_bytes + 63) // 64 * 64


cdef inline weight_matrix matrix(const Tensor* tensor, Py_ssize_t N, Py_ssize_t K) noexcept nogil:
    """Return the first layer's part of a tensor as a weight_matrix for the microkernels."""
    return weight_matrix(tensor.data, N, K)


cdef void encoder(const Net* net, State* s, Py_ssize_t ith, Py_ssize_t nth) noexcept nogil:
    """residual[r] = wte[token] + wpe[pos], (R, C). Rows are split over the workers."""
    cdef Py_ssize_t r, start, stop, C = net.C
    cdef weight_matrix wte = matrix(&net.w.wte, net.V, C)
    cdef weight_matrix wpe = matrix(&net.w.wpe, net.maxT, C)
    shard(s.R, ith, nth, &start, &stop)
    for r in range(start, stop):
        net.w.wte.format.widen(s.residual + r * C, &wte, s.rows[r].token)
        net.w.wpe.format.widen(s.proj + r * C, &wpe, s.rows[r].pos)
        micro.add_bias(s.residual + r * C, s.proj + r * C, C)


cdef void layernorm(
        const Net* net, State* s,
        Py_ssize_t index,       # among all layernorms of the network: 2 layer, 2 layer + 1, and 2L for the last
        const float* weight,    # IN (C,)
        const float* bias,      # IN (C,)
        const Py_ssize_t* wanted,   # IN (rows,) row numbers of the stream, or NULL for all rows in order
        Py_ssize_t rows, Py_ssize_t ith, Py_ssize_t nth) noexcept nogil:
    """ln[i] = layernorm(residual[row i]), (rows, C). Source: Ba et al. 2016.

    Rows are split over the workers, which then wait at the barrier. Of few rows, every worker computes all: no barrier."""
    cdef Py_ssize_t i, start = 0, stop = rows, C = net.C
    cdef const float* residual = s.residual + index * s.residual_step
    cdef float* ln = s.ln + index * s.ln_step + ith * s.ln_size
    cdef float* stats = NULL
    if s.ln_size == 0:
        shard(rows, ith, nth, &start, &stop)
    for i in range(start, stop):
        if s.stats != NULL:
            stats = s.stats + 2 * (index * s.R + i)
        micro.layernorm(ln + i * C, residual + (i if wanted == NULL else wanted[i]) * C, weight, bias, net.epsilon, C,
                        stats)


cdef inline Py_ssize_t block_outputs(const weight_format* format, Py_ssize_t K) noexcept nogil:
    """Return the outputs of K weights that fit BLOCK_BYTES, packed or in place: whole panels, and at least one."""
    cdef Py_ssize_t bytes = 4 * K if format.pack_weights != NULL else bytes_of(format, format.panel, K) // format.panel
    return max(<Py_ssize_t> BLOCK_BYTES // (bytes * format.panel), 1) * format.panel


cdef Py_ssize_t block_size(const Net* net) noexcept nogil:
    """Return the number of values of the largest block of weights that a product packs."""
    cdef const Tensor* tensor = <const Tensor*> &net.w
    cdef Py_ssize_t most = 0, C = net.C
    while tensor <= &net.w.head:
        if tensor.format.pack_weights != NULL:
            most = max(most, block_outputs(tensor.format, C) * padded(C))
            most = max(most, block_outputs(tensor.format, net.F) * padded(net.F))
        tensor += 1
    return most


cdef Py_ssize_t rows_of_gemm(const Net* net, bint most) noexcept nogil:
    """Return up to how many rows gemm serves the products of every tensor, or, with `most`, of any tensor."""
    cdef const Tensor* tensor = <const Tensor*> &net.w
    cdef Py_ssize_t found = tensor.format.narrow
    while tensor < &net.w.head:
        tensor += 1
        found = max(found, <Py_ssize_t> tensor.format.narrow) if most else min(found, <Py_ssize_t> tensor.format.narrow)
    return found


cdef Py_ssize_t padded(Py_ssize_t n) noexcept nogil:
    """Return n rounded up to a multiple of 16."""
    return (n + 15) // 16 * 16


cdef inline Py_ssize_t widest(const Net* net) noexcept nogil:
    """Return the inputs of the widest product, padded."""
    return padded(max(net.F, net.C))


cdef void store_keys_values(const Net* net, State* s, Py_ssize_t layer, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t start,
                            Py_ssize_t stop) noexcept nogil:
    """Copy the keys and values among the outputs [start, stop) of qkv to the caches of `rows` rows, head by head. The padding
    of a head is zero, so that it adds nothing to a dot product."""
    cdef Py_ssize_t n = max(start, net.C), r, head, d, count, C = net.C, HS = net.HS
    cdef const float* qkv = s.qkv + layer * s.qkv_step
    cdef float* cache
    while n < stop:
        head, d = n % C // HS, n % HS
        count = min(HS - d, stop - n)
        for r in range(row, row + rows):
            cache = s.rows[r].keys if n < 2 * C else s.rows[r].values
            cache += ((layer * net.NH + head) * s.rows[r].capacity + s.rows[r].pos) * net.HSp
            memcpy(cache + d, qkv + r * 3 * C + n, count * sizeof(float))
            if d + count == HS:
                memset(cache + HS, 0, (net.HSp - HS) * sizeof(float))
        n += count


cdef void finish(const Net* net, State* s, const Product* p, Py_ssize_t row, Py_ssize_t rows, Py_ssize_t n,
                 Py_ssize_t count) noexcept nogil:
    """Run the epilogue of a product on `rows` rows and `count` outputs, from (row, n) on."""
    cdef Py_ssize_t r, before
    cdef float* out
    cdef const float* bias
    if p.epilogue == NOTHING:
        return
    bias = p.bias + n
    for r in range(row, row + rows):
        out = p.out + r * p.ldo + n
        if p.epilogue == BIAS_KEYS_VALUES:
            micro.add_bias(out, bias, count)
        elif p.epilogue == BIAS_ACTIVATION:
            micro.add_bias_act[net.activation](p.after + r * p.ldo + n, out, bias, count)
        else:
            before = r if p.rows_before == NULL else p.rows_before[r]
            micro.add_bias_residual(p.after + r * p.N + n, p.before + before * p.N + n, out, bias, count)
    if p.epilogue == BIAS_KEYS_VALUES:
        store_keys_values(net, s, p.layer, row, rows, n, n + count)


cdef void block_of_outputs(const Net* net, State* s, const Product* p, float* block, Py_ssize_t n,
                           Py_ssize_t width) noexcept nogil:
    """Compute the outputs [n, n + width) of all rows of a large product. The weights are packed first if their format needs
    packing. The epilogue runs after each band of BAND_ROWS rows."""
    cdef Py_ssize_t r = 0, rows
    cdef const weight_format* format = p.weight.format
    cdef weight_matrix w = matrix(&p.weight, p.N, p.K)
    if format.pack_weights != NULL:
        format.pack_weights(block, &w, n, n + width)
    while r < p.rows:
        rows = min(<Py_ssize_t> BAND_ROWS, p.rows - r)
        format.product(p.out + r * p.ldo + n, p.ldo, s.packed + r * padded(p.K), rows, &w, n, n + width, block)
        finish(net, s, p, r, rows, n, width)
        r += rows


cdef int matmul(const Net* net, State* s, const Product* p, int phase, const trace_worker* me) noexcept nogil:
    """Compute out = inp weight^T, then the epilogue. Returns 1 if the step was aborted, else 0.

    For few rows, each worker streams its share of the weights. For many rows, the workers pack the rows together and wait at
    the barrier. Then they take blocks of outputs that fit the cache until all blocks are taken."""
    cdef Py_ssize_t n, start, stop, width
    cdef const weight_format* format = p.weight.format
    cdef weight_matrix w = matrix(&p.weight, p.N, p.K)
    if p.rows <= format.narrow:
        share(p.N, format.interleave, me.ith, me.nth, &start, &stop)
        format.gemm(p.out + start, p.ldo, p.inp, p.ldi, p.rows, &w, start, stop, s.scratch + me.ith * s.scratch_size)
        finish(net, s, p, 0, p.rows, start, stop - start)
        return 0
    share(p.rows, 16, me.ith, me.nth, &start, &stop)
    if start < stop:
        format.pack_rows(s.packed + start * padded(p.K), p.inp + start * p.ldi, p.ldi, stop - start, p.K)
    if done_and_wait(me, PACK, <int32_t> p.layer):
        return 1
    width = min(p.N // (SHARES * me.nth) // format.panel * format.panel, block_outputs(format, p.K))
    width = max(width, <Py_ssize_t> format.panel)
    while True:
        n = take(s.piles + p.layer * LAYER_PHASES + phase) * width
        if n >= p.N:
            return 0
        block_of_outputs(net, s, p, s.blocks + me.ith * s.block_size, n, min(width, p.N - n))


cdef void attend(const Net* net, State* s, Py_ssize_t layer, Py_ssize_t head, const Span* span, bint compact,
                 float* scratch) noexcept nogil:
    """Compute one head of one span: atty = softmax(q keys^T scale) values, over the keys up to each row's position.

    compact: atty has only the wanted rows."""
    cdef Py_ssize_t i, at, rows = span.stop - span.start, C = net.C, HS = net.HS, HSp = net.HSp, ldp = s.ldp
    cdef Row* first = s.rows + span.start
    cdef Py_ssize_t common = first.pos + 1                              # keys that every row of the span sees
    cdef Py_ssize_t offset = (layer * net.NH + head) * first.capacity * HSp
    cdef const float* keys = first.keys + offset
    cdef const float* values = first.values + offset
    cdef const float* qkv = s.qkv + layer * s.qkv_step
    cdef float* atty = s.atty + layer * s.atty_step
    cdef float* q = scratch                                             # (SPAN_ROWS, HSp)
    cdef float* acc = q + SPAN_ROWS * HSp                               # (SPAN_ROWS, HSp)
    cdef float* att = acc + SPAN_ROWS * HSp                             # (SPAN_ROWS, ldp)
    cdef float* probs
    cdef float[SPAN_ROWS] total
    memset(q, 0, 2 * SPAN_ROWS * HSp * sizeof(float))
    for i in range(rows):
        memcpy(q + i * HSp, qkv + (span.start + i) * 3 * C + head * HS, HS * sizeof(float))
    gemm_floats(float32, att, ldp, q, HSp, rows, keys, common + rows - 1, HSp)
    for i in range(rows):
        total[i] = micro.softmax(att + i * ldp, common + i, score_scale(net, layer), NULL)
    micro.mix(acc, att, ldp, rows, values, HSp, 0, common)
    for i in range(rows):
        micro.mix(acc + i * HSp, att + i * ldp, ldp, 1, values, HSp, common, common + i)
        at = first[i].want if compact else span.start + i
        if at >= 0:
            micro.store_scaled(atty + at * C + head * HS, acc + i * HSp, <float> 1 / total[i], HS)
    if s.probs != NULL and layer == s.probs_layer:
        for i in range(rows):
            probs = s.probs + (head * s.R + span.start + i) * ldp
            memset(probs, 0, ldp * sizeof(float))
            micro.store_scaled(probs, att + i * ldp, <float> 1 / total[i], common + i)


cdef void attention(const Net* net, State* s, Py_ssize_t layer, bint compact, Py_ssize_t ith, Py_ssize_t nth) noexcept nogil:
    """Compute causal attention of all rows, (R, 3C) -> (R, C), or of the wanted rows. A later row has more keys than an earlier
    one. So pairs of head and span are split over the workers by their numbers of keys."""
    cdef Py_ssize_t head, i, before, each = s.spans[s.n_spans - 1].cost, total = each * net.NH
    cdef float* scratch = s.scratch + ith * s.scratch_size
    for head in range(net.NH):
        before = head * each
        for i in range(s.n_spans):
            if before * nth // total == ith and (s.spans[i].W or not compact):
                attend(net, s, layer, head, s.spans + i, compact, scratch)
            before = head * each + s.spans[i].cost


cdef void cross_entropy(const Net* net, State* s, Py_ssize_t ith, Py_ssize_t nth) noexcept nogil:
    """losses[r] = -log(softmax(logits[r])[target]), or 0 without a target (-100). Rows are split over the workers.

    The function overwrites logits with exp(logits - max), and writes the sum of each row to total."""
    cdef Py_ssize_t r, start, stop
    cdef float* row
    cdef float target, highest
    shard(s.R, ith, nth, &start, &stop)
    for r in range(start, stop):
        if s.targets[r] < 0:
            s.losses[r] = 0
            continue
        row = s.logits + r * s.logits_row
        target = row[s.targets[r]]
        s.total[r] = micro.softmax(row, net.V, 1, &highest)
        s.losses[r] = <float> (natural_log(s.total[r]) - (<double> target - highest))

# ------------------------------------------------------------------------------------------------ (c) the forward pass


cdef int run_phase(const Net* net, State* s, int phase, int layer, const trace_worker* me) noexcept nogil:
    """Compute this worker's share of one phase of the network. Returns 1 if the step was aborted, else 0.

    After the last layer's qkv, nothing reads rows whose logits are not wanted. So these phases compute only the wanted rows,
    and the first of them puts these next to each other."""
    cdef bint compact = s.compact and phase > QKV and layer >= net.L - 1
    cdef Py_ssize_t R = s.W if compact else s.R, C = net.C, ith = me.ith, nth = me.nth
    cdef float* residual = s.residual + 2 * layer * s.residual_step     # the stream as it enters this layer ...
    cdef float* residual2 = residual + s.residual_step                  # ... after its attention ...
    cdef float* residual3 = residual2 + s.residual_step                 # ... and after its feed-forward
    cdef const float* ln1 = s.ln + 2 * layer * s.ln_step + ith * s.ln_size
    cdef const float* ln2 = ln1 + s.ln_step
    cdef float* qkv = s.qkv + layer * s.qkv_step
    cdef float* atty = s.atty + layer * s.atty_step
    cdef float* fch = s.fch + layer * s.fch_step
    cdef float* fch_gelu = s.fch_gelu + layer * s.fch_step
    cdef const Tensors* w = &net.w
    cdef const Py_ssize_t* gathered = NULL
    cdef Product p
    if compact:
        gathered = s.wanted
    if phase == ENCODER:
        encoder(net, s, ith, nth)                                                               # residual (R, C)
    elif phase == LN1:
        layernorm(net, s, 2 * layer, floats_of(&w.ln1w, layer), floats_of(&w.ln1b, layer), NULL, R, ith, nth)   # ln1 (R, C)
    elif phase == QKV:
        p = Product(qkv, 3 * C, ln1, C, part(&w.qkvw, layer), floats_of(&w.qkvb, layer), R, C, 3 * C,
                    BIAS_KEYS_VALUES, NULL, NULL, NULL, layer)
        return matmul(net, s, &p, phase, me)                                                    # qkv (R, 3C)
    elif phase == ATTENTION:
        attention(net, s, layer, compact, ith, nth)                                             # atty (R, C)
    elif phase == ATTPROJ:
        p = Product(s.proj, C, atty, C, part(&w.attprojw, layer), floats_of(&w.attprojb, layer), R, C, C,
                    BIAS_RESIDUAL, residual, gathered, residual2, layer)
        return matmul(net, s, &p, phase, me)                                                    # residual2 (R, C)
    elif phase == LN2:
        layernorm(net, s, 2 * layer + 1, floats_of(&w.ln2w, layer), floats_of(&w.ln2b, layer), NULL, R, ith, nth)   # ln2 (R, C)
    elif phase == FC:
        p = Product(fch, s.fch_row, ln2, C, part(&w.fcw, layer), floats_of(&w.fcb, layer), R, C, net.F,
                    BIAS_ACTIVATION, NULL, NULL, fch_gelu, layer)
        return matmul(net, s, &p, phase, me)                                                    # fch, fch_gelu (R, F)
    elif phase == FCPROJ:
        p = Product(s.proj, C, fch_gelu, s.fch_row, part(&w.fcprojw, layer), floats_of(&w.fcprojb, layer), R, net.F, C,
                    BIAS_RESIDUAL, residual2, NULL, residual3, layer)
        return matmul(net, s, &p, phase, me)                                                    # residual3 (R, C)
    elif phase == LNF:
        layernorm(net, s, 2 * layer, floats_of(&w.lnfw, 0), floats_of(&w.lnfb, 0), NULL if compact else s.wanted, s.W,
                  ith, nth)                                                                     # lnf (W, C)
    elif phase == LOGITS:
        p = Product(s.logits, s.logits_row, ln1, C, w.head, NULL, s.W, C, net.V, NOTHING, NULL, NULL, NULL, layer)
        return matmul(net, s, &p, phase, me)                                                    # logits (W, V)
    else:
        cross_entropy(net, s, ith, nth)                                                         # losses (R,)
    return 0


cdef inline Py_ssize_t phases(const Net* net, const State* s) noexcept nogil:
    """Return the number of phases of a step: encoder, seven a layer, last layernorm and logits if wanted, loss if wanted.

    A step that only extends caches ends with the last layer's qkv."""
    if s.compact and s.W == 0:
        return LAYER_PHASES * (net.L - 1) + QKV + 1
    return 1 + LAYER_PHASES * net.L + (2 if s.W else 0) + (1 if s.losses != NULL else 0)


cdef int forward(const Net* net, State* s, const trace_worker* me) noexcept nogil:
    """Run this worker's share of phases me.first to me.last - 1 over s.rows; most steps run all phases at once. Returns 1 if
    the step was aborted, else 0.

    The workers wait at the barrier after every phase, because the next phase reads their results. A barrier is left
    out after two kinds of phases: the last phase, and a layernorm that each worker computes for itself."""
    cdef Py_ssize_t i
    cdef int phase, layer
    cdef bint own
    trace_begin(me)
    for i in range(me.first, me.last):
        layer = <int> ((i - 1) // LAYER_PHASES)
        phase = LN1 + <int> ((i - 1) % LAYER_PHASES)
        if i == 0:
            phase, layer = ENCODER, 0
        elif layer == net.L:
            phase += LNF - LN1
        if run_phase(net, s, phase, layer, me):
            return 1
        own = s.ln_size and (phase == LN1 or phase == LN2 or phase == LNF)
        if own or i == phases(net, s) - 1:
            done(me, phase, layer)
        elif done_and_wait(me, phase, layer):
            return 1
    return 0

# ------------------------------------------------------------------------------------------------ (d) classes


def check_token(token, Py_ssize_t V) -> int:
    """Return a token id as an int. Raises InputError unless the id is a whole number from 0 to V - 1."""
    number = token if type(token) is int else whole(token)
    if number is None or not 0 <= number < V:
        text = token[:40] if isinstance(token, str) else shown(token if number is None or number < 0 else number)
        raise InputError(f"token {text!r} is not a token id of this model: ids are whole numbers from 0 to {V - 1}")
    return number


cdef class Floats:
    """A float32 array (rows, cols), C-contiguous, 64-byte aligned, not initialised. NumPy views it without a copy.

    `dense` says that all of the array will be used. Large dense arrays ask for huge pages, whose addresses resolve faster. A
    cache of keys and values is `sparse`: its heads begin far apart, and huge pages would fill the gaps between them. A large
    sparse array has a mapping of its own, because malloc() reuses pages, and then unused positions would take memory, too."""

    def __cinit__(self, Py_ssize_t rows, Py_ssize_t cols, *, bint dense=False, bint sparse=False):
        cdef void* memory = NULL
        cdef Py_ssize_t size, page = huge_page
        if rows < 0 or cols < 0 or (cols and rows > (<Py_ssize_t> 1 << 58) // cols):
            raise MemoryError(f"not enough memory for {rows} x {cols} float32 values")
        size = rows * cols * <Py_ssize_t> sizeof(float)
        dense = dense and size >= 2 * page
        if sparse and size >= page // 16:
            self.mapped = size
            memory = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
        elif posix_memalign(&memory, page if dense else 64, max(size, 1)):
            memory = MAP_FAILED
        if memory == MAP_FAILED:
            self.mapped = 0
            raise MemoryError(f"not enough memory for {rows} x {cols} float32 values ({size} bytes)")
        if dense:
            ask_huge_pages(memory, size)
        self.data = <float*> memory
        self.shape[:] = [rows, cols]
        self.strides[:] = [cols * <Py_ssize_t> sizeof(float), sizeof(float)]

    def __dealloc__(self):
        if self.mapped:
            munmap(self.data, self.mapped)
        else:
            free(self.data)

    def __len__(self) -> int:
        return self.shape[0]

    def __getbuffer__(self, Py_buffer* view, int flags):
        view.buf = self.data
        view.obj = self
        view.len = self.shape[0] * self.strides[0]
        view.itemsize = sizeof(float)
        view.readonly = 0
        view.ndim = 2
        view.format = NULL
        if flags & PyBUF_FORMAT:
            view.format = b"f"
        view.shape = self.shape
        view.strides = self.strides
        view.suboffsets = NULL
        view.internal = NULL

    def __reduce__(self):
        raise TypeError("Floats cannot be copied or pickled: copy the values with numpy.array(floats)")


cdef class Weights:
    """The addresses of the tensors. Their memory, for example a mapped file, is kept until close().

    kin: other weights of the same dimensions. Steps with these weights may extend the caches of kin."""

    def __init__(self, config not None, tensors not None, Weights kin=None):
        """Take for each name of config.table a pair (name of its weight format, its bytes), wte with V rows.

        The bytes are used in place, so later changes take effect. Biases and gains of other formats than float32 are widened
        here, once. Raises InputError for an unknown format, and for bytes that do not fit the shape."""
        cdef Net* net = &self.net
        cdef Tensor* tensor = <Tensor*> &net.w
        net.L, net.NH, net.C, net.V, net.HS, net.maxT = config.L, config.NH, config.C, config.V, config.HS, config.maxT
        net.HSp, net.F, net.epsilon = padded(net.HS), config.F, config.epsilon
        net.activation = ACTIVATIONS.index(config.activation)
        net.scaled, net.scaled_by_layer, net.tied = config.scaled, config.scaled_by_layer, config.tied
        self.kin = kin
        if kin is not None and (net.L, net.NH, net.C, net.V, net.maxT) != (
            kin.net.L, kin.net.NH, kin.net.C, kin.net.V, kin.net.maxT
        ):
            raise InputError("the other weights have other dimensions")
        self.kept = []
        for (name, shape, _, _), (_, symbols) in zip(config.tensors(padded=False), config.table, strict=True):
            format, data = tensors[name]
            layers, shape = (shape[0], shape[1:]) if symbols[0] == "L" else (1, shape)
            self._place(tensor, name, layers, shape, format, data)
            tensor += 1
        if net.tied:
            net.w.head = net.w.wte

    cdef _place(self, Tensor* tensor, str name, Py_ssize_t layers, tuple shape, format, data):
        """Point a tensor to its bytes. `shape` is the shape of one layer, (N, K) or (K,)."""
        cdef const unsigned char[::1] view = data
        cdef Py_ssize_t layer, K = shape[len(shape) - 1]
        cdef Floats wide
        cdef weight_matrix vector
        tensor.format = format_named(format)
        if len(shape) == 1 and tensor.format.interleave > 1:
            raise InputError(f"{name} is a vector: it cannot be of format {format}, only matrices can")
        tensor.step = bytes_of(tensor.format, shape[0] if len(shape) == 2 else 1, K)
        if view.shape[0] != layers * tensor.step:
            raise InputError(f"{name} has {view.shape[0]} bytes, expected {layers * tensor.step} in {format}")
        tensor.data = <const char*> &view[0]
        if len(shape) == 2 or tensor.format == float32:
            self.kept.append(memoryview(data))
            return
        wide = Floats(layers, K)
        for layer in range(layers):
            vector = weight_matrix(tensor.data + layer * tensor.step, 1, K)
            tensor.format.widen(wide.data + layer * K, &vector, 0)
        tensor[0] = Tensor(<const char*> wide.data, K * <Py_ssize_t> sizeof(float), float32)
        self.kept.append(wide)

    def close(self) -> None:
        """Release the memory. From now on, steps raise ClosedError."""
        self.net.w.wte.data = NULL
        self.kept = None

    def __reduce__(self):
        raise TypeError("weights cannot be copied or pickled: they belong to an open model, so open its file again")


cdef class KeysValues:
    """Keys and values of one sequence, (L, NH, capacity, HSp) float32 each. Positions below `length` are committed. Unused
    positions do not take memory, because the system allocates a page at its first write."""

    def __init__(self, Weights weights not None, Py_ssize_t capacity):
        self.weights = weights
        self.capacity = capacity
        self.length = 0
        rows = weights.net.L * weights.net.NH * capacity
        self.keys = Floats(rows, weights.net.HSp, sparse=True)
        self.values = Floats(rows, weights.net.HSp, sparse=True)

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays if every position is used."""
        return 2 * self.keys.shape[0] * self.keys.strides[0]

    def _truncate(self, Py_ssize_t length) -> None:
        self.length = min(self.length, max(length, 0))

    def __copy__(self):
        """Return an independent cache with the same rows, for the same model."""
        cdef KeysValues copy = type(self).__new__(type(self))
        KeysValues.__init__(copy, self.weights, self.capacity)
        getattr(copy, "__dict__", {}).update(getattr(self, "__dict__", {}))   # of a subclass
        copy_keys_values(copy, self)
        return copy

    def __deepcopy__(self, memo):
        return self.__copy__()

    def __reduce__(self):
        raise TypeError("a cache cannot be pickled: it belongs to an open model; keep the tokens and run them again")


cdef class Trace:
    """A log of the phases of a step: `capacity` events for each worker. Later events are counted and dropped."""

    def __cinit__(self, Py_ssize_t nth, Py_ssize_t capacity):
        cdef trace_log* log
        cdef Py_ssize_t i, bytes = sizeof(trace_log) + min(capacity, <Py_ssize_t> 1 << 50) * sizeof(trace_event)   # no overflow
        if nth < 1 or capacity < 1:
            raise InputError(f"a trace is for {capacity} events and {nth} workers: both numbers must be at least 1")
        self.memory = Floats(nth, (bytes + 63) // 64 * 16)
        memset(self.memory.data, 0, nth * self.memory.strides[0])   # touch the pages before timing begins
        self.nth, self.capacity = nth, capacity
        for i in range(nth):
            log = self.log(i)
            log.capacity, log.events = capacity, <trace_event*> (log + 1)

    cdef trace_log* log(self, Py_ssize_t ith) except NULL:
        if not 0 <= ith < self.nth:
            raise InputError(f"worker is {ith}: this trace has workers 0 to {self.nth - 1}")
        return <trace_log*> (self.memory.data + ith * self.memory.shape[1])

    def events(self, Py_ssize_t ith) -> list:
        """Return worker ith's events in time order: (phase name, layer, begin_ns, end_ns, left_ns).

        Call it only between steps."""
        cdef trace_log* log = self.log(ith)
        cdef trace_event* e
        cdef Py_ssize_t i
        found = []
        for i in range(log.count):
            e = log.events + i
            found.append((PHASES[e.phase], e.layer, e.begin_ns, e.end_ns, e.left_ns))
        return found

    def dropped(self, Py_ssize_t ith) -> int:
        """Return the number of worker ith's events beyond the capacity."""
        return self.log(ith).dropped

    def clear(self) -> None:
        """Remove all events. Call it only between steps."""
        cdef Py_ssize_t i
        cdef trace_log* log
        for i in range(self.nth):
            log = self.log(i)
            log.count = log.dropped = 0

    def stretch(self, Py_ssize_t ith, phase, double times) -> None:
        """Make worker ith spend `times` as long in a phase, or in every phase for None, to debug a report.

        Raises InputError for an unknown worker and ValueError for an unknown phase."""
        cdef trace_log* log = self.log(ith)
        log.stretched = -1 if phase is None else PHASES.index(phase)
        log.stretch = times

    def __reduce__(self):
        raise TypeError("a trace cannot be copied or pickled: copy the lists that events() returns")


cdef class Step:
    """One step over ragged rows. prepare() runs under the GIL; then every worker calls the step.

    The activations stay allocated between steps, so that a step of a known size allocates only its logits."""

    def __cinit__(self, Weights weights not None, Py_ssize_t nth, uint32_t spins, *_, **__):
        self.weights = weights
        self.shared = Floats(1, (sizeof(native_barrier) + self._piles()) // sizeof(float))
        memset(self.shared.data, 0, sizeof(native_barrier))
        self.barrier = <native_barrier*> self.shared.data
        self.state.piles = <work_pile*> (self.barrier + 1)
        self.nth = self.active = nth
        self.spins = spins
        self.room = 0

    def prepare(self, list rows not None, Py_ssize_t active) -> None:
        """Check and take the rows of the next step: tuples (token, KeysValues, want_logits), for the first `active` workers.
        Raises InputError for a token outside [0, V), a full cache, or another model's cache; ClosedError after close()."""
        cdef Py_ssize_t r = 0, longest = 0
        cdef Row* row
        cdef KeysValues cache
        cdef State* s = &self.state
        if self.weights.net.w.wte.data == NULL:
            raise ClosedError("the model is closed: open it again")
        if not 1 <= active <= self.nth:
            raise InputError(f"active is {active}: this step has 1 to {self.nth} workers")
        self.active = active
        s.R = s.W = 0
        if self.kept is not None:               # the step before was watched
            s.fch_gelu, s.probs, self.kept = s.fch, NULL, None
        for entry in rows:
            if not (isinstance(entry, (tuple, list)) and len(entry) == 3 and isinstance(entry[1], KeysValues)):
                raise InputError(f"row is {shown(entry)}: it must be (token, cache, want_logits)")
        # The caller's code may run here (an index(), a truth value) and change the caller's rows. So this line comes before
        # the checks of the caches and before any change of a cache.
        rows = [(check_token(token, self.weights.net.V), cache, bool(want)) for token, cache, want in rows]
        self.keep = [cache for _, cache, _ in rows]
        for cache in self.keep:
            if cache.weights is not (self.weights if self.weights.kin is None else self.weights.kin):
                raise InputError("the cache belongs to another model: make one with this model's new_cache()")
            cache.ahead = cache.length
        self._reserve(len(rows))
        for token, cache, want in rows:
            if cache.ahead == cache.capacity:
                raise InputError(
                    f"the cache is full: it has room for {cache.capacity} tokens; truncate it, or make a larger one")
            row = s.rows + r
            row.token, row.pos, row.capacity = token, cache.ahead, cache.capacity
            row.keys, row.values = cache.keys.data, cache.values.data
            cache.ahead += 1
            row.want = s.W if want else -1
            if want:
                s.wanted[s.W] = r
                s.W += 1
            longest = max(longest, cache.ahead)
            r += 1
        s.R = r
        s.compact = s.losses == NULL
        s.ln_size = FEW_ROWS * self.weights.net.C if r <= FEW_ROWS and s.compact else 0
        self.first, self.last = 0, 1 if self.forked and active > 1 else phases(&self.weights.net, s)
        self._cut_spans()
        self._reserve_scratch(longest)
        self._reserve_logits()
        memset(s.piles, 0, self._piles())
        barrier_reset(self.barrier, <uint32_t> active, self.spins)

    cdef _reserve(self, Py_ssize_t R):
        """Make room for R rows of activations."""
        cdef State* s = &self.state
        cdef Py_ssize_t C = self.weights.net.C
        if R <= self.room:
            return
        self.room = 0
        self._reserve_rows(R)
        s.fch_row = self.weights.net.F + 16
        self.workspace = Floats(1, R * (6 * C + s.fch_row) + max(R, self.nth * FEW_ROWS) * C, dense=True)
        s.residual = self.workspace.data
        s.qkv = s.residual + R * C
        s.atty = s.qkv + R * 3 * C
        s.proj = s.atty + R * C
        s.fch = s.fch_gelu = s.proj + R * C
        s.ln = s.fch + R * s.fch_row
        self.room = R

    cdef _reserve_logits(self):
        """Make room for the logits: fresh memory, because the caller owns it after the step."""
        cdef State* s = &self.state
        self.logits = Floats(s.W, self.weights.net.V)
        s.logits, s.logits_row = self.logits.data, self.weights.net.V

    cdef _reserve_rows(self, Py_ssize_t R):
        """Make room for the data of a step of R rows other than activations."""
        cdef State* s = &self.state
        if R > rows_of_gemm(&self.weights.net, most=False):
            s.block_size = block_size(&self.weights.net)
            self.packed = Floats(1, padded(R) * widest(&self.weights.net) + self.nth * s.block_size, dense=True)
            s.packed = self.packed.data
            s.blocks = s.packed + padded(R) * widest(&self.weights.net)
        self.described = Floats(R, (sizeof(Row) + sizeof(Span) + sizeof(Py_ssize_t)) // sizeof(float))
        s.rows = <Row*> self.described.data
        s.spans = <Span*> (s.rows + R)
        s.wanted = <Py_ssize_t*> (s.spans + R)

    cdef size_t _piles(self):
        """Return the bytes of s.piles: one pile for each phase that may be a product, including the logits."""
        return (self.weights.net.L + 2) * LAYER_PHASES * sizeof(work_pile)

    cdef _reserve_scratch(self, Py_ssize_t longest):
        """Make room for each worker: for an attention tile over `longest` keys, and for the few rows that gemm may repack."""
        cdef State* s = &self.state
        cdef Py_ssize_t ldp = padded(longest)
        cdef Py_ssize_t size = max(
            SPAN_ROWS * (2 * self.weights.net.HSp + ldp),
            min(s.R, rows_of_gemm(&self.weights.net, most=True)) * widest(&self.weights.net))
        if self.scratch is None or self.scratch.shape[1] < size:
            self.scratch = Floats(self.nth, 2 * size)   # twice the need: a growing sequence then reallocates rarely
        s.scratch = self.scratch.data
        s.scratch_size = self.scratch.shape[1]
        s.ldp = ldp

    cdef _cut_spans(self):
        """Cut the rows into spans of at most SPAN_ROWS neighbours in one cache."""
        cdef State* s = &self.state
        cdef Py_ssize_t r, cost = 0
        cdef Row* row
        s.n_spans = 0
        for r in range(s.R):
            row = s.rows + r
            if (
                r == 0 or row.keys != s.rows[r - 1].keys or row.pos != s.rows[r - 1].pos + 1
                or r - s.spans[s.n_spans - 1].start == SPAN_ROWS
            ):
                s.spans[s.n_spans].start, s.spans[s.n_spans].W = r, 0
                s.n_spans += 1
            cost += row.pos + 1
            s.spans[s.n_spans - 1].stop = r + 1
            s.spans[s.n_spans - 1].W += row.want >= 0
            s.spans[s.n_spans - 1].cost = cost

    def more(self) -> bool:
        """Return whether the prepared step has phases left after a round, and select the next phase for the next round."""
        if self.last == phases(&self.weights.net, &self.state):
            return False
        self.first, self.last = self.last, self.last + 1
        return True

    def __call__(self, Py_ssize_t ith, Py_ssize_t nth) -> None:
        """Run worker ith's share of this round of the prepared step, without the GIL."""
        if nth < self.active or ith < 0:
            raise InputError(f"worker {ith} of {nth}: this step was prepared for {self.active} workers")
        cdef trace_worker me
        if ith < self.active and self.state.R:
            me = self._worker(ith)
            with nogil:
                forward(&self.weights.net, &self.state, &me)

    cdef trace_worker _worker(self, Py_ssize_t ith) except *:
        """Return worker ith's description of this round."""
        cdef trace_worker me
        me.ith, me.nth, me.barrier = ith, self.active, self.barrier
        me.first, me.last = self.first, self.last
        me.log = NULL if self.trace is None else self.trace.log(ith)
        return me

    def watch(self, bint share_ln) -> int:
        """Let the prepared step stop where run_to() says, so that its activations can be read and changed between two rounds.
        share_ln: all workers read one ln, which can be changed. Return the number of phases."""
        cdef State* s = &self.state
        self.kept = Floats(1, s.R * (s.fch_row + self.weights.net.NH * s.ldp))
        s.fch_gelu = self.kept.data             # other steps write it over fch
        s.probs = s.fch_gelu + s.R * s.fch_row
        s.ln_size = 0 if share_ln else s.ln_size
        s.compact = False                       # every row may be read
        self.last = 0
        return phases(&self.weights.net, s)

    def run_to(self, Py_ssize_t stop, Py_ssize_t probs_layer) -> None:
        """Select the phases up to number `stop` for the next round. probs_layer: the layer that stores its probabilities."""
        self.first, self.last = self.last, stop
        self.state.probs_layer = probs_layer

    def view(self, name, Py_ssize_t layer):
        """Return the memory of an activation after its phase, its shape (NH, R, keys) or (R, width), and which columns it has.
        The memory is valid until the step ends. attproj and fcproj lack their bias, which the phase adds to the residual."""
        cdef State* s = &self.state
        cdef const Net* net = &self.weights.net
        cdef float* place = s.ln if name.startswith("ln") else s.residual
        cdef Py_ssize_t r, C = net.C, heads = 1, rows = s.R, row = C, first = 0, width = C
        if name in ("q", "k", "v"):
            place, row, first = s.qkv, 3 * C, C * <Py_ssize_t> "qkv".index(name)
        elif name == "probs":
            place, heads, row, width = s.probs, net.NH, s.ldp, s.ldp
        elif name == "atty":
            place = s.atty
        elif name in ("attproj", "fcproj"):
            place = s.proj
            for r in range(rows):
                micro.add_bias(place + r * C, floats_of(&net.w.attprojb if name == "attproj" else &net.w.fcprojb, layer), C)
        elif name in ("fch", "fch_gelu"):
            place, row, width = s.fch if name == "fch" else s.fch_gelu, s.fch_row, net.F
        elif name == "logits":
            place, rows, row, width = s.logits, s.W, net.V, net.V
        memory = PyMemoryView_FromMemory(<char*> place, heads * rows * row * sizeof(float), PyBUF_WRITE)
        shape = [heads, rows, row] if name == "probs" else [rows, row]
        return memory, shape, slice(first, first + width)

    def keep_keys_values(self, Py_ssize_t layer) -> None:
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

    def abort(self) -> None:
        """Release all workers from the barriers, because one worker cannot arrive. The results of the step are invalid."""
        barrier_abort(self.barrier)

    def finish(self) -> Floats:
        """Commit all rows to their caches at once, and return the logits (W, V)."""
        cdef KeysValues cache
        for cache in self.keep:
            cache.length = cache.ahead
        logits, self.logits, self.keep = self.logits, None, None
        return logits

    def __reduce__(self):
        raise TypeError("a step cannot be copied or pickled: it belongs to one model and its workers, so make another one")

# ------------------------------------------------------------------------------------------------ (e) quantised weights


cdef const weight_format* quantised_format(name) except NULL:
    """Find the table row of a quantised format. Raises InputError for other formats."""
    cdef const weight_format* format = format_named(name)
    if format.quantise == NULL:
        raise InputError(f"weight format is {name}: it must be q8_0 or q4_0")
    return format


cdef check_bytes(what, Py_ssize_t found, Py_ssize_t expected):
    if found != expected:
        raise InputError(f"{what} has {found} bytes, expected {expected}")


def matrix_bytes(format, Py_ssize_t N, Py_ssize_t K) -> int:
    """Return the bytes of a matrix of N outputs and K inputs in a weight format. Raises InputError for an unknown format."""
    return bytes_of(format_named(format), N, K)


cdef bint fill_panels(
        unsigned char[::1] out, const weight_format* to, const unsigned char[::1] source, const weight_format* come,
        Py_ssize_t source_step, Py_ssize_t layers, Py_ssize_t N, Py_ssize_t K, Py_ssize_t ith, Py_ssize_t nth) except *:
    """Fill worker ith's share of the panels of `layers` matrices (N, K) from format `come`, or from GGUF's blocks if NULL.

    source_step: bytes of a layer of the source. Returns whether the format could represent every number."""
    cdef Py_ssize_t start, stop, layer, first, last, step = bytes_of(to, N, K), groups = (N + 15) // 16
    cdef weight_matrix w
    cdef bint held = True
    cdef Floats room = Floats(16, (K + 31) // 32 * 32 + 16)
    check_bytes("out", out.shape[0], layers * step)
    check_bytes("source" if come != NULL else "blocks", source.shape[0], layers * source_step)
    shard(layers * groups, ith, nth, &start, &stop)
    with nogil:
        while start < stop:
            layer, first = start // groups, start % groups
            last = min(groups, first + stop - start)
            w = weight_matrix(&source[0] + layer * source_step, N, K)
            if come == NULL:
                panels_of_blocks(<char*> &out[0] + layer * step, <const char*> w.data, to.value_bytes // 4, N, K, first, last)
            else:
                held &= to.quantise(&out[0] + layer * step, come, &w, 16 * first, min(16 * last, N), room.data)
            start += last - first
    return held


def quantise_panels(
        unsigned char[::1] out not None, format, const unsigned char[::1] source not None, source_format,
        Py_ssize_t layers, Py_ssize_t N, Py_ssize_t K, Py_ssize_t ith, Py_ssize_t nth) -> bool:
    """Quantise worker ith's share of `layers` matrices (N, K) of any weight format to panels, without the GIL.

    Returns whether the format could represent every number of the share: finite, and in the range of a float16 scale. Raises
    InputError for buffers of another size, and if `format` is not quantised."""
    cdef const weight_format* come = format_named(source_format)
    return fill_panels(out, quantised_format(format), source, come, bytes_of(come, N, K), layers, N, K, ith, nth)


def blocks_to_panels(
        unsigned char[::1] out not None, format, const unsigned char[::1] blocks not None,
        Py_ssize_t layers, Py_ssize_t N, Py_ssize_t K, Py_ssize_t ith, Py_ssize_t nth) -> None:
    """Convert worker ith's share of `layers` matrices (N, K) from GGUF's blocks to panels, without the GIL.

    Raises InputError for buffers of another size, if K is not a multiple of 32, and if `format` is not quantised."""
    cdef const weight_format* to = quantised_format(format)
    if K % 32:
        raise InputError(f"K is {K}: it must be a multiple of 32")
    fill_panels(out, to, blocks, NULL, N * (K // 32) * (to.value_bytes + to.scale_bytes), layers, N, K, ith, nth)


def matrix_product(float[:, ::1] out not None, const float[:, ::1] inp not None, format,
                   const unsigned char[::1] weights not None, Py_ssize_t start, Py_ssize_t stop, *, bint packed) -> None:
    """Compute out = inp weights^T for the outputs [start, stop) of a matrix: inp (rows, K), out (rows, N). `packed` selects the
    kernel for many rows, else the kernel for few rows. For tests and probes of one microkernel."""
    cdef const weight_format* form = format_named(format)
    cdef Py_ssize_t rows = inp.shape[0], N = out.shape[1], K = inp.shape[1]
    cdef weight_matrix w = weight_matrix(&weights[0], N, K)
    cdef Floats room = Floats(padded(rows) + (stop - start + form.panel), padded(K))
    cdef float* packed_weights = room.data + padded(rows) * padded(K)
    check_bytes("weights", weights.shape[0], bytes_of(form, N, K))
    if not 0 <= start < stop <= N or start % form.interleave or (stop != N and stop % form.interleave) or out.shape[0] != rows:
        raise InputError(f"outputs are [{start}, {stop}): they must lie within [0, {N})")
    with nogil:
        if not packed:
            form.gemm(&out[0, start], N, &inp[0, 0], K, rows, &w, start, stop, room.data)
        else:
            form.pack_rows(room.data, &inp[0, 0], K, rows, K)
            if form.pack_weights != NULL:
                form.pack_weights(packed_weights, &w, start, stop)
            form.product(&out[0, start], N, room.data, rows, &w, start, stop, packed_weights)


def transpose(unsigned char[::1] out not None, const unsigned char[:, ::1] rows not None, Py_ssize_t width, Py_ssize_t K,
              Py_ssize_t start) -> None:
    """Write rows (count, N) of values of 2 or 4 bytes as the columns from `start` on of out (N, K), without the GIL.

    Raises InputError for buffers of another size."""
    cdef Py_ssize_t count = rows.shape[0], N = rows.shape[1] // width, n, k, n0, k0
    cdef const uint32_t* from4 = <const uint32_t*> &rows[0, 0]
    cdef const uint16_t* from2 = <const uint16_t*> &rows[0, 0]
    cdef uint32_t* to4 = <uint32_t*> &out[0]
    cdef uint16_t* to2 = <uint16_t*> &out[0]
    check_bytes("out", out.shape[0], N * K * width)
    if width not in (2, 4) or not 0 <= start <= start + count <= K:
        raise InputError(f"no such columns: [{start}, {start + count}) of {K}, values of {width} bytes")
    with nogil:
        for n0 in range(0, N, 16):              # tiles of 16 x 16 values: whole lines of both arrays
            for k0 in range(0, count, 16):
                for n in range(n0, min(n0 + 16, N)):
                    for k in range(k0, min(k0 + 16, count)):
                        if width == 4:
                            to4[n * K + start + k] = from4[k * N + n]
                        else:
                            to2[n * K + start + k] = from2[k * N + n]

# ------------------------------------------------------------------------------------------------ (f) probes


def probe_read(Floats memory not None, int streams, Py_ssize_t ith, Py_ssize_t nth) -> float:
    """Read worker ith's share of the memory in 1, 2, 4 or 8 streams, without the GIL. Returns the sum, so each read is kept."""
    cdef Py_ssize_t start, stop
    cdef float total
    shard(memory.shape[0] * memory.shape[1], ith, nth, &start, &stop)
    with nogil:
        total = micro.probe_read(memory.data + start, stop - start, streams)
    return total


def probe_fma(Py_ssize_t times) -> float:
    """Multiply and add in registers, without the GIL. Returns the number of floating-point operations."""
    cdef float total
    with nogil:
        total = micro.probe_fma(times)
    return times * micro.probe_flop if total == total else 0.0


def probe_dots(format, Py_ssize_t times) -> float:
    """Compute integer dot products of a quantised format in registers, without the GIL. Returns the number of operations.

    Raises InputError if `format` is not quantised."""
    cdef const weight_format* form = quantised_format(format)
    with nogil:
        form.probe(times)
    return <double> times * form.probe_operations


def zero(Floats memory not None) -> None:
    """Fill the memory with zeros, so that every page is allocated."""
    memset(memory.data, 0, memory.shape[0] * memory.strides[0])

# ------------------------------------------------------------------------------------------------ (g) samplers


cdef const float* row_of(const float[:, ::1] logits, Py_ssize_t row) except NULL:
    """Return the address of one row of (rows, V). Raises IndexError for an unknown row."""
    if not 0 <= row < logits.shape[0]:
        raise IndexError(f"row {row} of {logits.shape[0]}")
    return &logits[row, 0]


def greedy(const float[:, ::1] logits not None, Py_ssize_t row) -> int:
    """Return the first id of the highest logit in a row of (rows, V), or -1 if a logit is NaN or the highest is not finite."""
    return greedy_id(row_of(logits, row), logits.shape[1])


def median(const float[:, ::1] logits not None, Py_ssize_t row) -> int:
    """Return the first id at which the running sum of softmax(logits[row]) exceeds 0.5, or -1 if logits are not finite."""
    cdef const float* values = row_of(logits, row)
    cdef Py_ssize_t V = logits.shape[1], token
    cdef Floats e = Floats(1, V)
    with nogil:
        token = inverse_cdf_id(values, e.data, V, 0.5, micro.exps)
    return token


def sample_weights(const float[:, ::1] logits not None, Py_ssize_t row, *, double temperature, Py_ssize_t top_k, double top_p,
                   double min_p):
    """Return the sampling weights (1, V) of a row of (rows, V), not normalised: 1 for the most probable id, 0 for excluded ids
    (sampler.h). Returns None if the logits are not finite. The caller checks the options."""
    cdef const float* values = row_of(logits, row)
    cdef Py_ssize_t V = logits.shape[1]
    cdef sample_options options
    cdef int finite
    options.temperature, options.top_k, options.top_p, options.min_p = temperature, top_k, top_p, min_p
    cdef Floats e = Floats(1, V), room = Floats(4, V)
    cdef ranked* order = <ranked*> room.data
    with nogil:
        finite = sample_weights_of(e.data, values, V, &options, order, order + V, micro.exps)
    return e if finite else None


def race(Floats weights not None, uint64_t seed, uint32_t stream, uint64_t step) -> int:
    """Choose an id with a probability proportional to its weight (1, V), by random numbers that depend only on seed, stream,
    step (below 2^60) and id (sampler.h). Returns -1 if no weight is above 0."""
    cdef noise_source source = noise_source(seed=seed, step=step, stream=stream)
    cdef Py_ssize_t token
    with nogil:
        token = race_id(weights.data, NULL, weights.shape[1], &source, micro.noise)
    return token


def draw(const float[:, ::1] logits not None, Py_ssize_t row, *, double temperature, double min_p, uint64_t seed,
         uint32_t stream, uint64_t step) -> int:
    """Choose the id that race() chooses by the sample_weights() of a row of (rows, V) without top_k and top_p. The temperature
    is 0.001 to 1000. Returns -1 if the logits are not finite."""
    cdef noise_source source = noise_source(seed=seed, step=step, stream=stream)
    cdef unweighed values = unweighed(row_of(logits, row), 0, temperature, min_p, micro.exps)
    cdef Py_ssize_t token = -1, V = logits.shape[1]
    with nogil:
        values.max = highest(values.x, V)
        if isfinite(values.max):
            token = race_id(NULL, &values, V, &source, micro.noise)
    return token


def log_probabilities(const float[:, ::1] logits not None, Py_ssize_t row, Py_ssize_t token, Py_ssize_t count):
    """Return natural logarithms of softmax(logits[row]): for `token`, and as pairs (id, logarithm) for the `count` most
    probable ids. Of equally probable ids, the lowest comes first. Returns None if the logits are not finite."""
    cdef const float* values = row_of(logits, row)
    cdef Py_ssize_t V = logits.shape[1], i
    cdef float max_logit = highest(values, V)
    cdef double total
    cdef Floats e = Floats(1, V), room = Floats(4 if count else 0, V)
    cdef ranked* order = <ranked*> room.data
    if not 0 <= token < V:
        raise IndexError(f"token {token} of {V}")
    with nogil:
        total = log_sum(values, max_logit, e.data, V, micro.exps)
        if count and total == total:
            rank_ids(order, order + V, values, V)
    if total != total:
        return None
    top = [(order[i].id, (<double> values[order[i].id] - max_logit) - total) for i in range(min(count, V))]
    return (<double> values[token] - max_logit) - total, top


def copy_keys_values(KeysValues to not None, KeysValues source not None, length=None) -> None:
    """Copy the first `length` rows of a cache, by default all, to an empty cache of the same model. The caches are independent.
    Raises InputError if the caches do not fit, and if the source has fewer rows than `length`."""
    cdef Py_ssize_t i, rows = source.weights.net.L * source.weights.net.NH, width = source.weights.net.HSp
    cdef Py_ssize_t count = source.length if length is None else length
    cdef size_t size
    if not 0 <= count <= source.length:
        raise InputError(f"cannot copy {count} rows: the cache has only {source.length}")
    if to.weights is not source.weights or to.length or to.capacity < count:
        raise InputError("the target must be an empty cache of the same model, with room for all rows")
    size = count * width * sizeof(float)
    with nogil:
        for i in range(rows):
            memcpy(to.keys.data + i * to.capacity * width, source.keys.data + i * source.capacity * width, size)
            memcpy(to.values.data + i * to.capacity * width, source.values.data + i * source.capacity * width, size)
    to.length = count
