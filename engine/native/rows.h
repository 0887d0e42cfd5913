// What a decoder layer does with rows between its products, each in one pass over memory. Results are rounded to the
// model's precision where transformers rounds them.
#pragma once

#include <algorithm>
#include <cmath>

#include "lanes.h"
#include "team.h"

struct Rotation {
    void *qkv;                   // [rows, heads + 2 * kv_heads, dim]; queries are replaced by rotated ones
    const void *cosine, *sine;   // [rows, dim]
    const void *head_norm;       // [heads + kv_heads, dim], or null
    void *keys, *values;         // of the pool: [kv_heads, slots, dim]
    int64_t keys_head, values_head;
    const int64_t *slots;        // where each row's key and value go
    int32_t rows, heads, kv_heads, dim;
    float epsilon;
    int32_t threads;
};

namespace rows {

// Whether so many numbers take longer than waking other threads.
inline bool worth_a_team(int64_t rows, int64_t width) { return rows > 1 && rows * width > 1 << 14; }

// Calls see(place, load, store) for each LANES numbers of `width`, and for what is left of them.
template <typename See>
inline void lanewise(int width, See see) {
    int place = 0;
    for (; place + LANES <= width; place += LANES)
        see(place, [](const auto *from) { return load(from); }, [](auto *to, Lanes lanes) { store(to, lanes); });
    int rest = width - place;
    if (rest)
        see(place, [rest](const auto *from) { return load_some(from, rest); },
            [rest](auto *to, Lanes lanes) { store_some(to, lanes, rest); });
}

template <typename T>
inline void scale_to_unit(const T *from, const T *weight, T *to, int width, float epsilon) {
    Lanes squares = {};
    lanewise(width, [&](int place, auto get, auto) {
        Lanes lanes = get(from + place);
        squares += lanes * lanes;
    });
    float share = 1.0f / std::sqrt(sum(squares) / width + epsilon);
    lanewise(width, [&](int place, auto get, auto set) {
        set(to + place, as_stored(get(from + place) * share, from) * get(weight + place));
    });
}

// Adds `added` to `hidden` [rows, width], if it is not null, and gives the norm of the sum. From all threads of a team.
template <typename T>
void norm(T *hidden, const T *added, const T *weight, T *out, int rows, int width, float epsilon) {
    share(rows, [=](int64_t row) {
        T *sums = hidden + row * width;
        if (added) {
            const T *more = added + row * width;
            lanewise(width, [=](int place, auto get, auto set) { set(sums + place, get(sums + place) + get(more + place)); });
        }
        scale_to_unit(sums, weight, out + row * width, width, epsilon);
    });
}

// The second half of a head is the first half's imaginary part (Su et al. 2021, in the layout of transformers).
template <typename T>
inline void rotate(const T *from, const T *cosine, const T *sine, T *to, int dim) {
    int half = dim / 2;
    lanewise(half, [&](int place, auto get, auto set) {
        Lanes real = get(from + place), imaginary = get(from + half + place);
        set(to + place, as_stored(real * get(cosine + place), from) - as_stored(imaginary * get(sine + place), from));
        set(to + half + place, as_stored(imaginary * get(cosine + half + place), from) +
                                   as_stored(real * get(sine + half + place), from));
    });
}

// From all threads of a team.
template <typename T>
void rotate_and_write(const Rotation &call) {
    int heads = call.heads + call.kv_heads, dim = call.dim;
    share(call.rows, [&](int64_t row) {
        T *head = (T *)call.qkv + row * (heads + call.kv_heads) * dim;
        const T *cosine = (const T *)call.cosine + row * dim, *sine = (const T *)call.sine + row * dim;
        for (int index = 0; index < heads; index++, head += dim) {
            if (call.head_norm)
                scale_to_unit(head, (const T *)call.head_norm + index * dim, head, dim, call.epsilon);
            T *to = head;
            if (index >= call.heads)
                to = (T *)call.keys + (index - call.heads) * call.keys_head + call.slots[row] * dim;
            rotate(head, cosine, sine, to, dim);
        }
        for (int index = 0; index < call.kv_heads; index++, head += dim)
            std::copy(head, head + dim, (T *)call.values + index * call.values_head + call.slots[row] * dim);
    });
}

// out [rows, width] = SiLU of the first half of gate_up [rows, 2 * width] times its second half. From all threads of a
// team.
template <typename T>
void gate(const T *gate_up, T *out, int rows, int width) {
    share(rows, [=](int64_t row) {
        const T *gates = gate_up + row * 2 * width, *ups = gates + width;
        T *to = out + row * width;
        lanewise(width, [=](int place, auto get, auto set) {
            Lanes gate = get(gates + place), power = -LOG2_E * gate;
            Lanes activated = gate / (1.0f + exp2(power < 126.0f ? power : all(126.0f)));
            set(to + place, as_stored(activated, gates) * get(ups + place));
        });
    });
}

}  // namespace rows
