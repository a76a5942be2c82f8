# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True, initializedcheck=False
"""The serial program, kernel for kernel: the reference for correctness and speed-up, in inference and training.

The kernels are plain scalar loops over float32, with one thread and without a cache. Every call runs the whole network over all
tokens so far, and computes logits and probabilities for every row, as the serial `gpt` program does for each new token. Sums
run in ascending index, and a dot product starts from its bias. exp, tanh, cosh and log come from libm. The compiler flags are
those of the fast path. The loops are neither tuned nor slowed down on purpose. Backward kernels add to the given gradients.

There are B sequences of T tokens, N = B * T rows. The numbers equal llm.c's, and memory use is lower. Probabilities, and then
gradients, overwrite the logits. Activations that no backward kernel reads, and gradients of activations, are kept for one
layer only. Ctrl-C takes effect between layers.

Source: llm.c, train_gpt2.c, its functions without OpenMP."""

from cpython.exc cimport PyErr_CheckSignals
from libc.math cimport INFINITY, NAN, coshf, erff, expf, fabsf, fmaf, logf, rintf, sqrt, sqrtf, tanhf
from libc.string cimport memcpy, memset

from array import array

from .config import ACTIVATIONS, HEAD, TENSORS


# ---------------------------------------------------------------- kernels, forward
cdef void encoder_forward(
        float* out,                                   # OUT (B, T, C)
        const int* tokens, const float* wte, const float* wpe,  # IN (B, T), (V, C), (maxT, C)
        Py_ssize_t B, Py_ssize_t T, Py_ssize_t C) noexcept nogil:
    cdef Py_ssize_t n, i
    for n in range(B * T):
        for i in range(C):
            out[n * C + i] = wte[tokens[n] * C + i] + wpe[n % T * C + i]


cdef void layernorm_forward(
        float* out, float* means, float* rstds,       # OUT (N, C), (N,), (N,)
        const float* inp,                             # IN (N, C)
        const float* weight, const float* bias,       # IN (C,), (C,)
        Py_ssize_t N, Py_ssize_t C, float epsilon) noexcept nogil:
    cdef Py_ssize_t n, i
    cdef float mean, variance, shift, rstd
    for n in range(N):
        mean = 0
        for i in range(C):
            mean += inp[n * C + i]
        mean /= C
        variance = 0
        for i in range(C):
            shift = inp[n * C + i] - mean
            variance += shift * shift
        variance /= C
        rstd = <float> 1.0 / sqrtf(variance + epsilon)
        for i in range(C):
            out[n * C + i] = (inp[n * C + i] - mean) * rstd * weight[i] + bias[i]
        means[n] = mean
        rstds[n] = rstd


cdef void matmul_forward(
        float* out, const float* inp,                 # OUT (N, OC), IN (N, C)
        const float* weight, const float* bias,       # IN (OC, C), (OC,) or NULL
        Py_ssize_t N, Py_ssize_t C, Py_ssize_t OC) noexcept nogil:
    cdef Py_ssize_t n, o, i
    cdef float val
    for n in range(N):
        for o in range(OC):
            val = bias[o] if bias != NULL else <float> 0
            for i in range(C):
                val += inp[n * C + i] * weight[o * C + i]
            out[n * OC + o] = val


cdef void matmul_quantised_forward(
        float* out, const float* inp,                 # OUT (N, OC), IN (N, C)
        const signed char* weight, const float* scale,    # IN (OC, C), (OC, groups of 32 channels)
        const float* bias,                            # IN (OC,) or NULL
        Py_ssize_t N, Py_ssize_t C, Py_ssize_t OC) noexcept nogil:
    """The arithmetic of q8_0 and q4_0 (csrc/quantised_body.h). Each group of 32 inputs is rounded to int8. Its products with
    the weights are summed as integers; the sums of the groups are added in ascending order, each by a fused multiply-add."""
    cdef Py_ssize_t n, o, i, group, count, groups = (C + 31) // 32
    cdef float most, inverse, row_scale
    cdef int[32] q
    cdef int total
    for n in range(N):
        for o in range(OC):
            out[n * OC + o] = 0
        for group in range(groups):
            count = min(<Py_ssize_t> 32, C - 32 * group)
            most = 0
            for i in range(count):
                if not fabsf(inp[n * C + 32 * group + i]) <= most:    # keep a NaN
                    most = fabsf(inp[n * C + 32 * group + i])
                    if most != most:
                        break
            inverse = <float> 127 / most
            row_scale = most / <float> 127 if most < INFINITY else NAN
            for i in range(count):
                q[i] = 0
                if most < INFINITY and inverse < INFINITY:
                    q[i] = <int> rintf(inp[n * C + 32 * group + i] * inverse)
            for o in range(OC):
                total = 0
                for i in range(count):
                    total += weight[o * C + 32 * group + i] * q[i]
                out[n * OC + o] = fmaf(total, scale[o * groups + group] * row_scale, out[n * OC + o])
        for o in range(OC):
            if bias != NULL:
                out[n * OC + o] += bias[o]


cdef float float16(unsigned bits) noexcept nogil:
    """Return the value of a float16; the conversion to float32 is exact."""
    cdef unsigned exponent = bits >> 10 & 31
    cdef float fraction = bits & 1023
    if exponent == 31:
        fraction = NAN if bits & 1023 else INFINITY
    elif exponent:
        fraction = (1024 + fraction) * <float> (1 << (exponent - 1))
    return -fraction / (1 << 24) if bits >> 15 else fraction / (1 << 24)


cdef void unpack_panels(
    signed char* weight, float* scale,                # OUT (OC, C), (OC, groups of 32 channels)
    const unsigned char* panels,                      # IN values, then scales, interleaved for 16 outputs
    int bits, Py_ssize_t C, Py_ssize_t OC,            # bits of a value: 8 or 4
) noexcept nogil:
    cdef Py_ssize_t o, i, at, groups = (C + 31) // 32
    cdef const unsigned char* scales = panels + (OC + 15) // 16 * groups * 64 * bits
    for o in range(OC):
        for i in range(C):
            at = o // 16 * groups * 64 * bits
            if bits == 8:
                weight[o * C + i] = <signed char> panels[at + i // 4 * 64 + o % 16 * 4 + i % 4]
            else:
                weight[o * C + i] = (panels[at + i // 8 * 64 + o % 16 * 4 + i % 4] >> (i & 4) & 15) - 8
        for i in range(groups):
            at = 2 * ((o // 16 * groups + i) * 16 + o % 16)
            scale[o * groups + i] = float16(scales[at] | scales[at + 1] << 8)


cdef void attention_forward(
        float* out, float* att, const float* qkv,     # OUT (B, T, C), (B, NH, T, T), IN (B, T, 3C)
        Py_ssize_t B, Py_ssize_t T, Py_ssize_t C, Py_ssize_t NH, float scale) noexcept nogil:
    """Compute causal attention. The kernel does not touch att above its diagonal."""
    cdef Py_ssize_t b, t, h, t2, i, HS = C // NH
    cdef float maxval, expsum, val
    cdef const float* q
    cdef const float* k
    cdef const float* v
    cdef float* row
    cdef float* out_row
    for b in range(B):
        for t in range(T):
            for h in range(NH):
                q = qkv + (b * T + t) * 3 * C + h * HS
                row = att + ((b * NH + h) * T + t) * T
                out_row = out + (b * T + t) * C + h * HS
                maxval = -INFINITY
                for t2 in range(t + 1):
                    k = qkv + (b * T + t2) * 3 * C + C + h * HS
                    val = 0
                    for i in range(HS):
                        val += q[i] * k[i]
                    row[t2] = val * scale
                    if row[t2] > maxval:
                        maxval = row[t2]
                expsum = 0
                for t2 in range(t + 1):
                    row[t2] = expf(row[t2] - maxval)
                    expsum += row[t2]
                for i in range(HS):
                    out_row[i] = 0
                for t2 in range(t + 1):
                    v = qkv + (b * T + t2) * 3 * C + 2 * C + h * HS
                    row[t2] /= expsum
                    for i in range(HS):
                        out_row[i] += row[t2] * v[i]


cdef void gelu_forward(float* out, const float* inp, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t i
    cdef float x
    for i in range(size):
        x = inp[i]
        out[i] = <float> 0.5 * x * (1 + tanhf(<float> 0.7978845608028654 * (x + <float> 0.044715 * x * x * x)))


cdef void activation_forward(float* out, const float* inp, Py_ssize_t size, int activation) noexcept nogil:
    """Compute an activation by its number in config.ACTIVATIONS."""
    cdef Py_ssize_t i
    cdef float x
    if activation == 0:
        gelu_forward(out, inp, size)
        return
    for i in range(size):
        x = inp[i]
        if activation == 1:
            out[i] = <float> 0.5 * x * (1 + erff(x * <float> 0.7071067811865476))
        elif activation == 2:
            out[i] = 0 if x < 0 else x
        else:
            out[i] = x / (1 + expf(-x * (<float> 1 if activation == 3 else <float> 1.702)))


cdef void residual_forward(float* out, const float* inp1, const float* inp2, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(size):
        out[i] = inp1[i] + inp2[i]


cdef void softmax_forward(float* probs, const float* logits, Py_ssize_t N, Py_ssize_t V) noexcept nogil:
    """Compute the softmax of every row. probs and logits may be the same array."""
    cdef Py_ssize_t n, i
    cdef float maxval, expsum
    for n in range(N):
        maxval = -INFINITY
        for i in range(V):
            if logits[n * V + i] > maxval:
                maxval = logits[n * V + i]
        expsum = 0
        for i in range(V):
            probs[n * V + i] = expf(logits[n * V + i] - maxval)
            expsum += probs[n * V + i]
        for i in range(V):
            probs[n * V + i] /= expsum


cdef void crossentropy_forward(
        float* losses,                                # OUT (N,)
        const float* probs, const int* targets,       # IN (N, V), (N,)
        Py_ssize_t N, Py_ssize_t V) noexcept nogil:
    cdef Py_ssize_t n
    for n in range(N):
        losses[n] = -logf(probs[n * V + targets[n]]) if targets[n] >= 0 else 0   # -100: no target


# ---------------------------------------------------------------- kernels, backward: dX is the loss's gradient by X
cdef void crossentropy_softmax_backward(
        float* dlogits, float dloss,                  # OUT (N, V), IN the gradient of every loss
        const float* probs, const int* targets,       # IN (N, V), (N,)
        Py_ssize_t N, Py_ssize_t V) noexcept nogil:
    """Compute dlogits, which may be the same array as probs. Unlike other backward kernels, this one overwrites its output."""
    cdef Py_ssize_t n, i
    cdef float indicator
    for n in range(N):
        for i in range(V):
            indicator = 1 if i == targets[n] else 0
            dlogits[n * V + i] = (probs[n * V + i] - indicator) * dloss if targets[n] >= 0 else 0


cdef void residual_backward(float* dinp1, float* dinp2, const float* dout, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t i
    for i in range(size):
        dinp1[i] += dout[i]
        dinp2[i] += dout[i]


cdef void gelu_backward(float* dinp, const float* inp, const float* dout, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t i
    cdef float x, arg, tanh_out, cosh_out, sech_out, factor = <float> 0.7978845608028654
    for i in range(size):
        x = inp[i]
        arg = factor * (x + <float> 0.044715 * x * x * x)
        tanh_out = tanhf(arg)
        cosh_out = coshf(arg)
        sech_out = 1 / (cosh_out * cosh_out)  # tanh's slope at arg
        dinp[i] += dout[i] * (
            <float> 0.5 * (1 + tanh_out) + x * <float> 0.5 * sech_out * factor * (1 + 3 * <float> 0.044715 * x * x)
        )


cdef void activation_backward(float* dinp, const float* inp, const float* dout, Py_ssize_t size, int activation) noexcept nogil:
    cdef Py_ssize_t i
    cdef float x, s, slope = <float> 1 if activation == 3 else <float> 1.702
    if activation == 0:
        gelu_backward(dinp, inp, dout, size)
        return
    for i in range(size):
        x = inp[i]
        if activation == 1:
            s = <float> 0.5 * (1 + erff(x * <float> 0.7071067811865476))
            dinp[i] += dout[i] * (s + x * <float> 0.3989422804014327 * expf(-<float> 0.5 * x * x))
        elif activation == 2:
            dinp[i] += dout[i] * (<float> 1 if x > 0 else <float> 0)
        else:
            s = 1 / (1 + expf(-x * slope))
            dinp[i] += dout[i] * (s + x * s * (1 - s) * slope)


cdef void attention_backward(
        float* dqkv,                                  # OUT (B, T, 3C)
        float* dpreatt, float* datt,                  # SCRATCH (T,), (T,) for the current row
        const float* dout, const float* qkv, const float* att,  # IN (B, T, C), (B, T, 3C), (B, NH, T, T)
        Py_ssize_t B, Py_ssize_t T, Py_ssize_t C, Py_ssize_t NH, float scale) noexcept nogil:
    cdef Py_ssize_t b, t, h, t2, t3, i, q, k, v, HS = C // NH
    cdef float indicator
    cdef const float* row
    cdef const float* dout_row
    for b in range(B):
        for t in range(T):
            for h in range(NH):
                row = att + ((b * NH + h) * T + t) * T
                dout_row = dout + (b * T + t) * C + h * HS
                for t2 in range(t + 1):
                    datt[t2] = dpreatt[t2] = 0
                # through the sum of values
                for t2 in range(t + 1):
                    v = (b * T + t2) * 3 * C + 2 * C + h * HS
                    for i in range(HS):
                        datt[t2] += qkv[v + i] * dout_row[i]
                        dqkv[v + i] += row[t2] * dout_row[i]
                # through the softmax
                for t2 in range(t + 1):
                    for t3 in range(t + 1):
                        indicator = 1 if t2 == t3 else 0
                        dpreatt[t3] += row[t2] * (indicator - row[t3]) * datt[t2]
                # through the scaled dot products of query and keys
                q = (b * T + t) * 3 * C + h * HS
                for t2 in range(t + 1):
                    k = (b * T + t2) * 3 * C + C + h * HS
                    for i in range(HS):
                        dqkv[q + i] += qkv[k + i] * dpreatt[t2] * scale
                        dqkv[k + i] += qkv[q + i] * dpreatt[t2] * scale


cdef void matmul_backward(
        float* dinp, float* dweight, float* dbias,    # OUT (N, C), (OC, C), (OC,) or NULL
        const float* dout, const float* inp, const float* weight,  # IN (N, OC), (N, C), (OC, C)
        Py_ssize_t N, Py_ssize_t C, Py_ssize_t OC) noexcept nogil:
    cdef Py_ssize_t n, o, i
    cdef float d
    for n in range(N):
        for o in range(OC):
            d = dout[n * OC + o]
            for i in range(C):
                dinp[n * C + i] += weight[o * C + i] * d
    for o in range(OC):
        for n in range(N):
            d = dout[n * OC + o]
            if dbias != NULL:
                dbias[o] += d
            for i in range(C):
                dweight[o * C + i] += inp[n * C + i] * d


cdef void layernorm_backward(
        float* dinp, float* dweight, float* dbias,    # OUT (N, C), (C,), (C,)
        const float* dout, const float* inp, const float* weight,  # IN (N, C), (N, C), (C,)
        const float* means, const float* rstds,       # IN (N,), (N,)
        Py_ssize_t N, Py_ssize_t C) noexcept nogil:
    cdef Py_ssize_t n, i
    cdef float norm, dnorm, dnorm_mean, dnorm_norm_mean
    for n in range(N):
        dnorm_mean = 0
        dnorm_norm_mean = 0
        for i in range(C):
            norm = (inp[n * C + i] - means[n]) * rstds[n]
            dnorm = weight[i] * dout[n * C + i]
            dnorm_mean += dnorm
            dnorm_norm_mean += dnorm * norm
        dnorm_mean /= C
        dnorm_norm_mean /= C
        for i in range(C):
            norm = (inp[n * C + i] - means[n]) * rstds[n]
            dnorm = weight[i] * dout[n * C + i]
            dbias[i] += dout[n * C + i]
            dweight[i] += norm * dout[n * C + i]
            dinp[n * C + i] += (dnorm - dnorm_mean - norm * dnorm_norm_mean) * rstds[n]


cdef void encoder_backward(
        float* dwte, float* dwpe,                     # OUT (V, C), (maxT, C)
        const float* dout, const int* tokens,         # IN (B, T, C), (B, T)
        Py_ssize_t B, Py_ssize_t T, Py_ssize_t C) noexcept nogil:
    cdef Py_ssize_t n, i
    for n in range(B * T):
        for i in range(C):
            dwte[tokens[n] * C + i] += dout[n * C + i]
            dwpe[n % T * C + i] += dout[n * C + i]


# ---------------------------------------------------------------- the optimiser
cdef struct Adam:  # parameters.AdamW in float32
    float lr, beta1, beta2, rest1, rest2, correction1, correction2, eps, gradient_scale, decay


cdef void adamw_update(
        float* parameters, const float* gradients,    # INOUT (size,), IN (size,)
        float* first, float* second,                  # INOUT (size,), (size,)
        Py_ssize_t size, const Adam* step) noexcept nogil:
    cdef Py_ssize_t i
    cdef float gradient
    for i in range(size):
        gradient = step.gradient_scale * gradients[i]
        first[i] = step.beta1 * first[i] + step.rest1 * gradient
        second[i] = step.beta2 * second[i] + step.rest2 * gradient * gradient
        parameters[i] -= step.lr * (
            first[i] / step.correction1 / (sqrtf(second[i] / step.correction2) + step.eps) + step.decay * parameters[i]
        )


cdef double sum_of_squares(const float* values, Py_ssize_t size) noexcept nogil:
    cdef Py_ssize_t i
    cdef double total = 0
    for i in range(size):
        total += <double> values[i] * values[i]
    return total


# ---------------------------------------------------------------- the network
cdef struct Shape:
    Py_ssize_t B, T, C, L, NH, V, F
    int activation
    float epsilon
    bint scaled, scaled_by_layer


cdef float score_scale(Shape s, Py_ssize_t layer) noexcept nogil:
    """Return the factor of one layer's attention scores."""
    cdef float scale = <float> 1.0 / sqrtf(<float> (s.C // s.NH)) if s.scaled else 1
    return scale / (layer + 1) if s.scaled_by_layer else scale


cdef enum:
    COUNT = 17


cdef struct Tensors:  # in the order of config.TENSORS: the weights (read only) or their gradients
    float *wte, *wpe
    float *ln1w, *ln1b, *qkvw, *qkvb, *attprojw, *attprojb
    float *ln2w, *ln2b, *fcw, *fcb, *fcprojw, *fcprojb
    float *lnfw, *lnfb
    float *head  # wte if it is tied
    Py_ssize_t[COUNT] step  # values from one layer's part to the next; 0 for tensors without layers


cdef struct Quantised:  # a matrix as integers and their scales; all NULL for float32
    signed char* weight
    float* scale
    Py_ssize_t step, scale_step  # from one layer's part to the next


cdef struct Matrices:  # the tensors that may be quantised
    Quantised wte, qkvw, attprojw, fcw, fcprojw, head


cdef Tensors tensors_in(config, arrays) except *:
    """Return pointers to the tensors in flat float32 arrays by name, and NULL for missing names."""
    cdef Tensors tensors
    cdef float** field = <float**> &tensors
    cdef const float[::1] values
    cdef Py_ssize_t i
    for i in range(COUNT):
        name, dims = (*TENSORS, HEAD)[i]
        field[i], tensors.step[i] = NULL, 0
        if name not in arrays:
            continue
        values = arrays[name]
        field[i] = <float*> &values[0]
        tensors.step[i] = values.shape[0] // <Py_ssize_t> config.L if dims[0] == "L" else 0
    if config.tied:
        tensors.head = tensors.wte
    return tensors


cdef Tensors tensors_of_layer(Tensors w, Py_ssize_t layer) noexcept nogil:
    """Return the pointers to one layer's part of each tensor."""
    cdef float** field = <float**> &w
    cdef Py_ssize_t i
    for i in range(COUNT):
        if field[i] != NULL:
            field[i] += layer * w.step[i]
    return w


cdef void product_forward(
        float* out, const float* inp, const float* weight, const Quantised* quantised, Py_ssize_t layer, const float* bias,
        Py_ssize_t N, Py_ssize_t C, Py_ssize_t OC) noexcept nogil:
    """Run matmul_forward, or its quantised form if the weights are quantised."""
    if quantised.weight == NULL:
        matmul_forward(out, inp, weight, bias, N, C, OC)
    else:
        matmul_quantised_forward(
            out, inp, quantised.weight + layer * quantised.step, quantised.scale + layer * quantised.scale_step, bias, N, C, OC
        )


cdef struct Acts:  # pointers only; Activations allocates the arrays
    float *encoded
    float *ln1, *ln1_mean, *ln1_rstd, *qkv, *atty, *att, *residual2, *ln2, *ln2_mean, *ln2_rstd, *fch, *fch_gelu, *residual3
    float *attproj, *fcproj, *lnf, *lnf_mean, *lnf_rstd
    float *logits
    Py_ssize_t[13] step  # from ln1 to residual3: values from one layer's part to the next; 0 if layers overwrite each other


cdef Acts acts_of_layer(Acts a, Py_ssize_t layer) noexcept nogil:
    """Return the pointers to the activations of one layer."""
    cdef float** field = &a.ln1
    cdef Py_ssize_t i
    for i in range(13):
        field[i] += layer * a.step[i]
    return a


cdef struct Grads:  # gradients of the current layer's activations; Training.backward allocates the arrays
    float *residual3
    float *residual   # of the stream that enters the layer: residual3 of the previous layer
    float *ln1, *qkv, *atty, *attproj, *residual2, *ln2, *fch, *fch_gelu, *fcproj, *lnf, *preatt, *att


cdef int stop_if_interrupted() except -1 with gil:
    """Let Python's signal handlers run, so that Ctrl-C raises here."""
    PyErr_CheckSignals()
    return 0


cdef int network_forward(Acts acts, Tensors weights, const Matrices* m, const int* tokens, Shape s) except -1 nogil:
    """Compute the activations up to the logits."""
    cdef Py_ssize_t N = s.B * s.T, C = s.C, layer
    cdef const float* residual = acts.encoded
    cdef Tensors w
    cdef Acts a
    encoder_forward(acts.encoded, tokens, weights.wte, weights.wpe, s.B, s.T, C)
    for layer in range(s.L):
        w = tensors_of_layer(weights, layer)
        a = acts_of_layer(acts, layer)
        layernorm_forward(a.ln1, a.ln1_mean, a.ln1_rstd, residual, w.ln1w, w.ln1b, N, C, s.epsilon)
        product_forward(a.qkv, a.ln1, w.qkvw, &m.qkvw, layer, w.qkvb, N, C, 3 * C)
        attention_forward(a.atty, a.att, a.qkv, s.B, s.T, C, s.NH, score_scale(s, layer))
        product_forward(a.attproj, a.atty, w.attprojw, &m.attprojw, layer, w.attprojb, N, C, C)
        residual_forward(a.residual2, residual, a.attproj, N * C)
        layernorm_forward(a.ln2, a.ln2_mean, a.ln2_rstd, a.residual2, w.ln2w, w.ln2b, N, C, s.epsilon)
        product_forward(a.fch, a.ln2, w.fcw, &m.fcw, layer, w.fcb, N, C, s.F)
        activation_forward(a.fch_gelu, a.fch, N * s.F, s.activation)
        product_forward(a.fcproj, a.fch_gelu, w.fcprojw, &m.fcprojw, layer, w.fcprojb, N, s.F, C)
        residual_forward(a.residual3, a.residual2, a.fcproj, N * C)
        residual = a.residual3
        stop_if_interrupted()
    layernorm_forward(acts.lnf, acts.lnf_mean, acts.lnf_rstd, residual, weights.lnfw, weights.lnfb, N, C, s.epsilon)
    product_forward(acts.logits, acts.lnf, weights.head, &m.head, 0, NULL, N, C, s.V)
    stop_if_interrupted()
    return 0


cdef int network_backward(
    Acts acts, Grads d, Tensors weights, Tensors gradients, const int* inputs, const int* targets, float dloss, Shape s,
) except -1 nogil:
    """Add every tensor's gradient. The activations end in probabilities, which the logits' gradients overwrite."""
    cdef Py_ssize_t N = s.B * s.T, C = s.C, layer
    cdef const float* residual = acts_of_layer(acts, s.L - 1).residual3
    cdef size_t row_bytes = N * C * sizeof(float), other_bytes = <size_t> (<char*> d.preatt - <char*> d.residual)
    cdef Tensors w, g
    cdef Acts a
    memset(d.residual3, 0, row_bytes)
    memset(d.residual, 0, other_bytes)
    crossentropy_softmax_backward(acts.logits, dloss, acts.logits, targets, N, s.V)
    matmul_backward(d.lnf, gradients.head, NULL, acts.logits, acts.lnf, weights.head, N, C, s.V)
    stop_if_interrupted()
    layernorm_backward(
        d.residual3, gradients.lnfw, gradients.lnfb, d.lnf, residual, weights.lnfw, acts.lnf_mean, acts.lnf_rstd, N, C
    )
    for layer in range(s.L - 1, -1, -1):
        w = tensors_of_layer(weights, layer)
        g = tensors_of_layer(gradients, layer)
        a = acts_of_layer(acts, layer)
        residual = acts_of_layer(acts, layer - 1).residual3 if layer else acts.encoded
        memset(d.residual, 0, other_bytes)
        residual_backward(d.residual2, d.fcproj, d.residual3, N * C)
        matmul_backward(d.fch_gelu, g.fcprojw, g.fcprojb, d.fcproj, a.fch_gelu, w.fcprojw, N, s.F, C)
        activation_backward(d.fch, a.fch, d.fch_gelu, N * s.F, s.activation)
        matmul_backward(d.ln2, g.fcw, g.fcb, d.fch, a.ln2, w.fcw, N, C, s.F)
        layernorm_backward(d.residual2, g.ln2w, g.ln2b, d.ln2, a.residual2, w.ln2w, a.ln2_mean, a.ln2_rstd, N, C)
        residual_backward(d.residual, d.attproj, d.residual2, N * C)
        matmul_backward(d.atty, g.attprojw, g.attprojb, d.attproj, a.atty, w.attprojw, N, C, C)
        attention_backward(d.qkv, d.preatt, d.att, d.atty, a.qkv, a.att, s.B, s.T, C, s.NH, score_scale(s, layer))
        matmul_backward(d.ln1, g.qkvw, g.qkvb, d.qkv, a.ln1, w.qkvw, N, C, 3 * C)
        layernorm_backward(d.residual, g.ln1w, g.ln1b, d.ln1, residual, w.ln1w, a.ln1_mean, a.ln1_rstd, N, C)
        memcpy(d.residual3, d.residual, row_bytes)
        stop_if_interrupted()
    encoder_backward(gradients.wte, gradients.wpe, d.residual3, inputs, s.B, s.T, C)
    return 0


# ---------------------------------------------------------------- the Python interface
def _floats(size):
    """Return `size` zeroed float32 values as a flat memoryview."""
    return memoryview(bytearray(4 * size)).cast("f")


def _cut(float[::1] flat, config):
    """Return the tensors by name, as parts of a flat array in a version 3 file's layout."""
    view = memoryview(flat)
    return {name: view[offset : offset + size] for name, _, offset, size in config.tensors(padded=True)}


cdef float[::1] point(float** fields, sizes):
    """Allocate contiguous arrays of the given sizes, and point each field to one. The caller keeps the returned memory."""
    cdef float[::1] memory = _floats(sum(sizes))
    cdef float* place = &memory[0]
    for i, size in enumerate(sizes):
        fields[<Py_ssize_t> i] = place
        place += <Py_ssize_t> size
    return memory


cdef class Activations:
    """The activations for B sequences of T tokens: of all layers with `keep`, else of the current layer only."""

    cdef Acts acts
    cdef Shape shape
    cdef float[::1] memory
    cdef readonly object logits         # (N, V), allocated separately: the logits may outlive the other activations

    def __cinit__(self, config, Py_ssize_t B, Py_ssize_t T, *, bint keep):
        cdef Py_ssize_t C = config.C, V = config.V, N = B * T, layers = config.L if keep else 1
        self.shape = Shape(B, T, C, config.L, config.NH, V, config.F, ACTIVATIONS.index(config.activation), config.epsilon,
                           config.scaled, config.scaled_by_layer)
        # in the order of Acts
        of_layers = (N * C, N, N, N * 3 * C, N * C, N * config.NH * T, N * C, N * C, N, N, N * config.F, N * config.F, N * C)
        self.memory = point(<float**> &self.acts, (N * C, *(layers * size for size in of_layers), N * C, N * C, N * C, N, N))
        for i, size in enumerate(of_layers):
            self.acts.step[<Py_ssize_t> i] = size if keep else 0
        self.logits = _floats(N * V)
        cdef float[::1] logits = self.logits
        self.acts.logits = &logits[0]

    cdef void forward(self, Tensors weights, const Matrices* matrices, const int* tokens) except *:
        """Run the network without the GIL, up to the logits."""
        with nogil:
            network_forward(self.acts, weights, matrices, tokens, self.shape)


cdef class Reference:
    """GPT-2 as the serial program computes it. forward(tokens) gives logits and probabilities of every row."""

    cdef readonly object config
    cdef object arrays                  # keeps the memory of the weights
    cdef Tensors weights
    cdef Matrices matrices

    def __init__(self, config, arrays, panels=None):
        """Take the tensors by name. arrays: flat float32 arrays, used in place; wte has at least V rows. panels: pairs
        (q8_0 or q4_0, bytes) of the quantised tensors."""
        arrays = dict(arrays)
        self.config, self.arrays = config, [arrays]
        for name, (format, data) in (panels or {}).items():
            values = self._unpack(name, {"q8_0": 8, "q4_0": 4}[format], data)
            if name == "wte":
                arrays[name] = values  # rows of the embedding, as float32
        if config.tied:
            self.matrices.head = self.matrices.wte
        self.weights = tensors_in(config, arrays)

    cdef _unpack(self, name, int bits, const unsigned char[::1] data):
        """Unpack a quantised tensor, and point to it. Returns its values as float32."""
        cdef Quantised* fields = <Quantised*> &self.matrices
        cdef Quantised* to = fields + <Py_ssize_t> ("wte", "qkvw", "attprojw", "fcw", "fcprojw", "head").index(name)
        cdef Py_ssize_t layer, o, i, layers, N, K, groups
        shapes = {found: shape for found, shape, _, _ in self.config.tensors(padded=False)}
        layers, N, K = shapes[name] if len(shapes[name]) == 3 else (1, *shapes[name])
        groups = (K + 31) // 32
        weights = memoryview(bytearray(layers * N * K)).cast("b")
        cdef signed char[::1] weight = weights
        cdef float[::1] scale = _floats(layers * N * groups), values = _floats(N * K)
        self.arrays += [weight, scale]
        to.weight, to.scale, to.step, to.scale_step = &weight[0], &scale[0], N * K, N * groups
        for layer in range(layers):
            unpack_panels(
                to.weight + layer * N * K, to.scale + layer * N * groups, &data[layer * (data.shape[0] // layers)], bits, K, N
            )
        for o in range(N):
            for i in range(K):
                values[o * K + i] = scale[o * groups + i // 32] * weight[o * K + i]
        return values

    def forward(self, tokens) -> tuple:
        """Return (logits, probs), memoryviews (T, V), for T token ids; each id is below V, and T is at most maxT."""
        cdef Py_ssize_t T = len(tokens), V = self.config.V
        cdef Activations activations = Activations(self.config, 1, T, keep=False)
        cdef const int[::1] token_ids = array("i", tokens)
        probs = _floats(T * V)
        cdef float[::1] probs_view = probs
        activations.forward(self.weights, &self.matrices, &token_ids[0])
        with nogil:
            softmax_forward(&probs_view[0], activations.acts.logits, T, V)
        return tuple(flat.cast("B").cast("f", [T, V]) for flat in (activations.logits, probs))


cdef class Training:
    """GPT-2's training as the serial program computes it, over the caller's flat arrays in a version 3 file's layout.

    Inputs and targets are int32 arrays (B, T) of ids below V, and T is at most maxT. The caller checks these limits."""

    cdef readonly object config
    cdef float[::1] parameters, gradients
    cdef Tensors weights, dweights
    cdef Activations activations        # of the last forward(), until backward() consumes them
    cdef const int[:, ::1] inputs, targets   # of the last forward()
    cdef readonly Py_ssize_t updates    # the number of updates so far

    def __init__(self, float[::1] parameters, float[::1] gradients, config):
        self.config = config
        self.parameters, self.gradients = parameters, gradients
        self.weights, self.dweights = tensors_in(config, _cut(parameters, config)), tensors_in(config, _cut(gradients, config))

    def forward(self, const int[:, ::1] inputs, const int[:, ::1] targets):
        """Return the losses, a memoryview (B, T), and keep the activations for backward()."""
        self.activations = None
        activations = Activations(self.config, inputs.shape[0], inputs.shape[1], keep=True)
        losses = self.losses(activations, inputs, targets)
        self.activations, self.inputs, self.targets = activations, inputs, targets
        return losses

    def evaluate(self, const int[:, ::1] inputs, const int[:, ::1] targets):
        """Return the losses, a memoryview (B, T), and leave the activations of forward() unchanged."""
        return self.losses(Activations(self.config, inputs.shape[0], inputs.shape[1], keep=False), inputs, targets)

    cdef losses(self, Activations activations, const int[:, ::1] inputs, const int[:, ::1] targets):
        """Run the network, convert its logits to probabilities in place, and return the losses."""
        cdef Shape s = activations.shape
        cdef Matrices floats
        cdef float* logits = activations.acts.logits
        memset(&floats, 0, sizeof(floats))
        losses = _floats(s.B * s.T)
        cdef float[::1] out = losses
        activations.forward(self.weights, &floats, &inputs[0, 0])
        with nogil:
            softmax_forward(logits, logits, s.B * s.T, s.V)
            crossentropy_forward(&out[0], logits, &targets[0, 0], s.B * s.T, s.V)
        return losses.cast("B").cast("f", [s.B, s.T])

    @property
    def ready(self) -> bool:
        """Return whether forward() has left activations for backward()."""
        return self.activations is not None

    def backward(self, *, bint accumulate, double scale) -> None:
        """Add the gradients of scale * mean loss, to zeros unless `accumulate`. Needs `ready`, and consumes the activations."""
        cdef Activations activations = self.activations
        cdef const int[:, ::1] inputs = self.inputs, targets = self.targets
        self.activations = None  # from here on the probabilities are overwritten
        cdef Shape s = activations.shape
        cdef Py_ssize_t NC = s.B * s.T * s.C, NF = s.B * s.T * s.F
        cdef Py_ssize_t b, t, trained = 0
        for b in range(s.B):
            for t in range(s.T):
                trained += targets[b, t] >= 0
        cdef float dloss = <float> (scale / max(trained, 1))
        cdef Grads d
        cdef float[::1] _memory = point(  # the name keeps the memory alive as long as `d`
            <float**> &d, (NC, NC, NC, 3 * NC, NC, NC, NC, NC, NF, NF, NC, NC, s.T, s.T)
        )
        with nogil:
            if not accumulate:
                memset(&self.gradients[0], 0, self.gradients.shape[0] * sizeof(float))
            network_backward(activations.acts, d, self.weights, self.dweights, &inputs[0, 0], &targets[0, 0], dloss, s)

    def gradient_norm(self) -> float:
        """Return the 2-norm of all gradients, summed in float64 in ascending order."""
        cdef double total
        with nogil:
            total = sum_of_squares(&self.gradients[0], self.gradients.shape[0])
        return sqrt(total)

    def update(self, float[::1] first_moments, float[::1] second_moments, numbers) -> None:
        """Update the parameters by one step of AdamW. `numbers` is a parameters.AdamW."""
        cdef Py_ssize_t begin, size
        cdef Adam step = Adam(
            numbers.lr, numbers.beta1, numbers.beta2, numbers.rest1, numbers.rest2,
            numbers.correction1, numbers.correction2, numbers.eps, numbers.gradient_scale, 0,
        )
        for start, stop, decay in numbers.spans:
            step.decay = decay
            begin, size = start, stop - start
            with nogil:
                adamw_update(
                    &self.parameters[begin], &self.gradients[begin], &first_moments[begin], &second_moments[begin], size, &step
                )
        self.updates += 1


# The addresses of the kernels, for tests that call a single kernel through ctypes.
KERNELS = {
    "encoder_forward": <size_t> &encoder_forward, "layernorm_forward": <size_t> &layernorm_forward,
    "matmul_forward": <size_t> &matmul_forward, "matmul_quantised_forward": <size_t> &matmul_quantised_forward,
    "unpack_panels": <size_t> &unpack_panels, "attention_forward": <size_t> &attention_forward,
    "gelu_forward": <size_t> &gelu_forward, "residual_forward": <size_t> &residual_forward,
    "softmax_forward": <size_t> &softmax_forward, "crossentropy_forward": <size_t> &crossentropy_forward,
    "crossentropy_softmax_backward": <size_t> &crossentropy_softmax_backward, "residual_backward": <size_t> &residual_backward,
    "gelu_backward": <size_t> &gelu_backward, "attention_backward": <size_t> &attention_backward,
    "matmul_backward": <size_t> &matmul_backward, "layernorm_backward": <size_t> &layernorm_backward,
    "encoder_backward": <size_t> &encoder_backward,
}
