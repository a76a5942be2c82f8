# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The serial program, kernel for kernel: the yardstick for correctness and for speed-up.

Plain scalar loops over float32, one thread, no cache: every call runs the whole network over all tokens so far, with logits
and probabilities for every row, as the serial `gpt` program does for each new token. Sums run in ascending index, a dot
product starts from its bias, exp and tanh are libm's. Compiled with the same flags as the fast path; nothing here is tuned,
and nothing is slowed down on purpose.

Source: llm.c, train_gpt2.c, its forward functions without OpenMP.
"""

from libc.math cimport INFINITY, expf, sqrtf, tanhf
from libc.stdint cimport uint16_t, uint32_t
from libc.string cimport memcpy


cdef void encoder_forward(
    float* out,                                       # OUT (T, C)
    const int* tokens, const float* wte, const float* wpe,  # IN (T,), (V, C), (maxT, C)
    Py_ssize_t T, Py_ssize_t C,
) noexcept nogil:
    cdef Py_ssize_t t, i
    for t in range(T):
        for i in range(C):
            out[t * C + i] = wte[tokens[t] * C + i] + wpe[t * C + i]


cdef void layernorm_forward(
    float* out, const float* inp,                     # OUT (T, C), IN (T, C)
    const float* weight, const float* bias,           # IN (C,), (C,)
    Py_ssize_t T, Py_ssize_t C,
) noexcept nogil:
    cdef Py_ssize_t t, i
    cdef float mean, variance, shift, rstd
    for t in range(T):
        mean = 0
        for i in range(C):
            mean += inp[t * C + i]
        mean /= C
        variance = 0
        for i in range(C):
            shift = inp[t * C + i] - mean
            variance += shift * shift
        variance /= C
        rstd = <float> 1.0 / sqrtf(variance + <float> 1e-5)
        for i in range(C):
            out[t * C + i] = (inp[t * C + i] - mean) * rstd * weight[i] + bias[i]


cdef void matmul_forward(
    float* out, const float* inp,                     # OUT (T, OC), IN (T, C)
    const float* weight, const float* bias,           # IN (OC, C), (OC,) or NULL
    Py_ssize_t T, Py_ssize_t C, Py_ssize_t OC,
) noexcept nogil:
    cdef Py_ssize_t t, o, i
    cdef float val
    for t in range(T):
        for o in range(OC):
            val = bias[o] if bias != NULL else <float> 0
            for i in range(C):
                val += inp[t * C + i] * weight[o * C + i]
            out[t * OC + o] = val


cdef void attention_forward(
    float* out, float* att, const float* qkv,         # OUT (T, C), SCRATCH (T,), IN (T, 3C)
    Py_ssize_t T, Py_ssize_t C, Py_ssize_t NH,
) noexcept nogil:
    cdef Py_ssize_t t, h, t2, i, HS = C // NH
    cdef float scale = <float> 1.0 / sqrtf(<float> HS), maxval, expsum, val
    cdef const float* q
    cdef const float* k
    for t in range(T):
        for h in range(NH):
            q = qkv + t * 3 * C + h * HS
            maxval = -INFINITY
            for t2 in range(t + 1):
                k = qkv + t2 * 3 * C + C + h * HS
                val = 0
                for i in range(HS):
                    val += q[i] * k[i]
                att[t2] = val * scale
                if att[t2] > maxval:
                    maxval = att[t2]
            expsum = 0
            for t2 in range(t + 1):
                att[t2] = expf(att[t2] - maxval)
                expsum += att[t2]
            for i in range(HS):
                out[t * C + h * HS + i] = 0
            for t2 in range(t + 1):
                val = att[t2] / expsum
                for i in range(HS):
                    out[t * C + h * HS + i] += val * qkv[t2 * 3 * C + 2 * C + h * HS + i]


cdef void gelu_forward(float* out, const float* inp, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    cdef float x
    for i in range(n):
        x = inp[i]
        out[i] = <float> 0.5 * x * (1 + tanhf(<float> 0.7978845608028654 * (x + <float> 0.044715 * x * x * x)))


cdef void residual_forward(float* out, const float* inp1, const float* inp2, Py_ssize_t n) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(n):
        out[i] = inp1[i] + inp2[i]


cdef void softmax_forward(float* probs, const float* logits, Py_ssize_t T, Py_ssize_t V) noexcept nogil:
    cdef Py_ssize_t t, i
    cdef float maxval, expsum
    for t in range(T):
        maxval = -INFINITY
        for i in range(V):
            if logits[t * V + i] > maxval:
                maxval = logits[t * V + i]
        expsum = 0
        for i in range(V):
            probs[t * V + i] = expf(logits[t * V + i] - maxval)
            expsum += probs[t * V + i]
        for i in range(V):
            probs[t * V + i] /= expsum


def _floats(size):
    """Zeroed room for `size` float32 values, as a flat memoryview."""
    return memoryview(bytearray(4 * size)).cast("f")


cdef class Reference:
    """GPT-2 as the serial program computes it. forward(tokens) gives logits and probabilities of every row."""

    cdef readonly object config
    cdef const float[::1] params        # the sixteen tensors in file order, float32
    cdef dict begin                     # name -> offset of its first value

    def __init__(self, values, config, *, bint padded, bint bf16):
        """`values`: the tensors' bytes as the checkpoint stores them; bfloat16 is widened once, float32 used in place."""
        self.config = config
        self.params = self._widen(values) if bf16 else values.cast("f")
        self.begin = {name: offset for name, _, offset, _ in config.tensors(padded=padded)}

    @staticmethod
    def _widen(values):
        cdef const uint16_t[::1] narrow = values.cast("H")
        wide = _floats(len(values) // 2)
        cdef float[::1] out = wide
        cdef uint32_t bits
        cdef Py_ssize_t i
        for i in range(narrow.shape[0]):
            bits = <uint32_t> narrow[i] << 16
            memcpy(&out[i], &bits, sizeof(bits))
        return wide

    cdef const float* tensor(self, name, Py_ssize_t index=0) except NULL:
        return &self.params[<Py_ssize_t> self.begin[name] + index]

    def forward(self, tokens) -> tuple:
        """Return (logits, probs), memoryviews of shape (T, V), for T token ids, each below V, T at most maxT."""
        cdef Py_ssize_t T = len(tokens), C = self.config.C, NH = self.config.NH, V = self.config.V, layer
        ids = memoryview(bytearray(4 * T)).cast("i")
        for t, token in enumerate(tokens):
            ids[t] = token
        cdef const int[::1] token_ids = ids
        cdef float[::1] residual = _floats(T * C), ln = _floats(T * C), qkv = _floats(T * 3 * C), att = _floats(T)
        cdef float[::1] atty = _floats(T * C), proj = _floats(T * C), fch = _floats(T * 4 * C), fch_gelu = _floats(T * 4 * C)
        logits, probs = bytearray(4 * T * V), bytearray(4 * T * V)
        cdef float[::1] logits_view = memoryview(logits).cast("f"), probs_view = memoryview(probs).cast("f")

        encoder_forward(&residual[0], &token_ids[0], self.tensor("wte"), self.tensor("wpe"), T, C)
        for layer in range(self.config.L):
            layernorm_forward(&ln[0], &residual[0], self.tensor("ln1w", layer * C), self.tensor("ln1b", layer * C), T, C)
            matmul_forward(
                &qkv[0], &ln[0], self.tensor("qkvw", layer * 3 * C * C), self.tensor("qkvb", layer * 3 * C), T, C, 3 * C
            )
            attention_forward(&atty[0], &att[0], &qkv[0], T, C, NH)
            matmul_forward(
                &proj[0], &atty[0], self.tensor("attprojw", layer * C * C), self.tensor("attprojb", layer * C), T, C, C
            )
            residual_forward(&residual[0], &residual[0], &proj[0], T * C)
            layernorm_forward(&ln[0], &residual[0], self.tensor("ln2w", layer * C), self.tensor("ln2b", layer * C), T, C)
            matmul_forward(
                &fch[0], &ln[0], self.tensor("fcw", layer * 4 * C * C), self.tensor("fcb", layer * 4 * C), T, C, 4 * C
            )
            gelu_forward(&fch_gelu[0], &fch[0], T * 4 * C)
            matmul_forward(
                &proj[0], &fch_gelu[0], self.tensor("fcprojw", layer * 4 * C * C), self.tensor("fcprojb", layer * C),
                T, 4 * C, C,
            )
            residual_forward(&residual[0], &residual[0], &proj[0], T * C)
        layernorm_forward(&ln[0], &residual[0], self.tensor("lnfw"), self.tensor("lnfb"), T, C)
        matmul_forward(&logits_view[0], &ln[0], self.tensor("wte"), NULL, T, C, V)
        softmax_forward(&probs_view[0], &logits_view[0], T, V)
        return memoryview(logits).cast("f", [T, V]), memoryview(probs).cast("f", [T, V])
