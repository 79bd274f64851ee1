// Scalar functions of the compiled code, in operations that compilers vectorize.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

using i64 = int64_t;
using bf16 = uint16_t;  // a bfloat16 number: the upper half of a float32

inline float widen(bf16 x) {
    const uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float widen(float x) {
    return x;
}

// Round to nearest, ties to even, as PyTorch does. NaN stays NaN.
inline bf16 narrow(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

// e^x with a relative error below 2e-7 for |x| <= 87 (Cephes, expf). NaN stays NaN.
inline float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    const float n = std::rint(x * 1.44269504f);                 // e^x = 2^n e^r, |r| <= ln(2) / 2
    const float r = x - n * 0.693359375f + n * 2.12194440e-4f;  // x - n ln(2)
    float p = 1.9875691500e-4f;
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 0.5f})
        p = p * r + c;
    const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;  // 2^n
    float power;
    std::memcpy(&power, &bits, 4);
    return (p * r * r + r + 1.0f) * power;
}

// Rotate the pairs (j, j + D / 2) of one head of one token, as `rope.py` does; sign -1: backwards.
template <class Number>
inline void rotate(const Number *__restrict from, bf16 *__restrict to, const float *__restrict cos,
                   const float *__restrict sin, i64 half, float sign) {
#pragma omp simd
    for (i64 j = 0; j < half; j++) {
        const float a = widen(from[j]), b = widen(from[j + half]), s = sign * sin[j];
        to[j] = narrow(a * cos[j] - b * s);
        to[j + half] = narrow(b * cos[j] + a * s);
    }
}
