// Vectors of the processor's width, numbers of 16 bits, and the functions on them that the kernels share.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Lanes __attribute__((vector_size(LANES * 4)));
typedef int32_t IntLanes __attribute__((vector_size(LANES * 4)));
typedef uint32_t BitLanes __attribute__((vector_size(LANES * 4)));
typedef uint16_t HalfLanes __attribute__((vector_size(LANES * 2)));

struct Bfloat16 {
    uint16_t bits;
};

inline Lanes load(const float *from) {
    Lanes lanes;
    std::memcpy(&lanes, from, sizeof lanes);
    return lanes;
}

inline void store(float *to, Lanes lanes) { std::memcpy(to, &lanes, sizeof lanes); }

inline Lanes widened(HalfLanes halves) {
#if defined(__AVX512F__)
    return (Lanes)((BitLanes)_mm512_cvtepu16_epi32((__m256i)halves) << 16);
#else
    return (Lanes)(__builtin_convertvector(halves, BitLanes) << 16);
#endif
}

inline Lanes load(const Bfloat16 *from) {
    HalfLanes halves;
    std::memcpy(&halves, from, sizeof halves);
    return widened(halves);
}

// To the nearest number of 16 bits, to the even one if there are two; NaN stays NaN.
inline HalfLanes rounded(Lanes lanes) {
#if defined(__AVX512BF16__)
    return (HalfLanes)_mm512_cvtneps_pbh((__m512)lanes);
#else
    BitLanes bits = (BitLanes)lanes;
    BitLanes nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return __builtin_convertvector(lanes == lanes ? nearest : (bits >> 16) | 0x40, HalfLanes);
#endif
}

inline void store(Bfloat16 *to, HalfLanes halves) { std::memcpy(to, &halves, sizeof halves); }

inline void store(Bfloat16 *to, Lanes lanes) { store(to, rounded(lanes)); }

inline float number(float from) { return from; }

inline float number(Bfloat16 from) {
    uint32_t bits = (uint32_t)from.bits << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

// The first `count` of LANES numbers; the others are zero, or left alone.
template <typename T>
inline Lanes load_some(const T *from, int count) {
    T some[LANES] = {};
    std::memcpy(some, from, count * sizeof(T));
    return load(some);
}

template <typename T>
inline void store_some(T *to, Lanes lanes, int count) {
    T some[LANES];
    store(some, lanes);
    std::memcpy(to, some, count * sizeof(T));
}

template <typename T>
inline void store_at_most(T *to, Lanes lanes, int count) {
    count >= LANES ? store(to, lanes) : store_some(to, lanes, count);
}

// Two adjacent numbers of 16 bits, in the places of one of 32.
struct Pair {
    float both;
};

// As the precision of T has it.
inline Lanes as_stored(Lanes lanes, const float *) { return lanes; }

inline Lanes as_stored(Lanes lanes, const Bfloat16 *) { return widened(rounded(lanes)); }

inline Lanes all(float value) { return value - Lanes{}; }

inline Lanes larger(Lanes one, Lanes other) { return one > other ? one : other; }

// Lane i of the result is lane i + distance, which is what a tree of operations over all lanes needs.
template <int distance>
inline Lanes moved(Lanes lanes) {
    IntLanes from;
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; lane++) from[lane] = (lane + distance) % LANES;
    return __builtin_shuffle(lanes, from);
}

template <int distance = LANES / 2>
inline float largest(Lanes lanes) {
    lanes = larger(lanes, moved<distance>(lanes));
    if constexpr (distance > 1) return largest<distance / 2>(lanes);
    return lanes[0];
}

template <int distance = LANES / 2>
inline float sum(Lanes lanes) {
    lanes += moved<distance>(lanes);
    if constexpr (distance > 1) return sum<distance / 2>(lanes);
    return lanes[0];
}

// Sums with the products of one number, or pair of numbers, per lane.
inline Lanes multiplied(Lanes sums, Lanes one, Lanes other, float) { return sums + one * other; }

#if defined(__AVX512BF16__)
inline Lanes multiplied(Lanes sums, Lanes one, Lanes other, Pair) {
    return (Lanes)_mm512_dpbf16_ps((__m512)sums, (__m512bh)one, (__m512bh)other);
}
#else
inline Lanes multiplied(Lanes sums, Lanes, Lanes, Pair) { return sums; }  // never called
#endif

// The first of LANES vectors becomes the sums of each of them.
template <int half = LANES / 2>
inline Lanes sums_of(Lanes *vectors) {
    IntLanes own, other;
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; lane++) {
        own[lane] = lane & half ? LANES + lane : lane;
        other[lane] = lane & half ? LANES + lane - half : lane + half;
    }
#pragma GCC unroll 8
    for (int index = 0; index < half; index++)
        vectors[index] = __builtin_shuffle(vectors[index], vectors[index + half], own) +
                         __builtin_shuffle(vectors[index], vectors[index + half], other);
    if constexpr (half > 1) return sums_of<half / 2>(vectors);
    return vectors[0];
}

constexpr float LOG2_E = 1.44269504088896340736f;

// Two to the power of x, which is at most 127; zero for x below -126. The polynomial was fitted to 2^x on -0.5..0.5
// for the least relative error, which is 1e-7.
inline Lanes exp2(Lanes x) {
    x = larger(x, all(-127.0f));
    const float shift = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
    Lanes shifted = x + shift;
    Lanes part = x - (shifted - shift);
    IntLanes whole = (IntLanes)shifted - 0x4b400000;
    Lanes power = all(1.326472724709380e-03f);
    power = power * part + 9.671512688152238e-03f;
    power = power * part + 5.550733743574309e-02f;
    power = power * part + 2.402224208463511e-01f;
    power = power * part + 6.931469775987169e-01f;
    power = power * part + 1.0f;
    return power * (Lanes)((whole + 127) << 23);
}

// Near zero a polynomial (fitted like that above, to 5e-9), since the formula loses there what is small.
inline Lanes tanh(Lanes x) {
    Lanes square = x * x;
    Lanes series = all(-5.704978752e-03f);
    series = series * square + 2.063908016e-02f;
    series = series * square - 5.373971301e-02f;
    series = series * square + 1.333144217e-01f;
    series = series * square - 3.333328194e-01f;
    Lanes bounded = larger(x < 20.0f ? x : all(20.0f), all(-20.0f));
    Lanes formula = 1.0f - 2.0f / (exp2(bounded * (2.0f * LOG2_E)) + 1.0f);
    return square < 0.39f ? x + x * square * series : formula;
}
