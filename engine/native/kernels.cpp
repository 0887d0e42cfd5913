// What the engine calls, through a C interface: each function for each precision.
#include "stack.h"

#define KERNELS(NAME, T, ELEMENT)                                                                                      \
    void attend_##NAME(const Attention *call) { attention::run<T, ELEMENT>(*call); }                                   \
    void rotate_##NAME(const Rotation *call) {                                                                         \
        in_team(call->threads, rows::worth_a_team(call->rows, (call->heads + 2 * call->kv_heads) * call->dim),         \
                [=] { rows::rotate_and_write<T>(*call); });                                                            \
    }                                                                                                                  \
    void norm_##NAME(T *hidden, const T *added, const T *weight, T *out, int32_t rows, int32_t width, float epsilon,   \
                     int32_t threads) {                                                                                \
        in_team(threads, rows::worth_a_team(rows, width),                                                              \
                [=] { rows::norm(hidden, added, weight, out, rows, width, epsilon); });                                \
    }                                                                                                                  \
    void gate_##NAME(const T *gate_up, T *out, int32_t rows, int32_t width, int32_t threads) {                         \
        in_team(threads, rows::worth_a_team(rows, width), [=] { rows::gate(gate_up, out, rows, width); });             \
    }

#define STEPS(NAME, T, ELEMENT)                                                                                        \
    void step_##NAME(const Model *model, const Step *step) { stack::run<T, ELEMENT>(*model, *step); }

extern "C" {
KERNELS(float32, float, float)
STEPS(float32, float, float)
#if defined(__AVX512BF16__)
KERNELS(bfloat16, Bfloat16, Pair)
STEPS(bfloat16, Bfloat16, Pair)
#else
KERNELS(bfloat16, Bfloat16, float)
#endif
}
