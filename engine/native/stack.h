// A whole step of a model of the Llama kind, for few rows: with many, the products take the time, and oneDNN has
// better ones; with few, calling it takes longer than the products do.
#pragma once

#include <vector>

#include "attention.h"
#include "rows.h"

// A weight in oneDNN's layout: panels of so many outputs, each [inputs][panel_outputs], where two adjacent inputs are
// together if they have 16 bits. `panel_inputs` counts what is added to make whole vectors, too.
struct Product {
    const void *panels;
    const void *bias;  // [outputs], or null
    int32_t inputs, outputs, panel_inputs, panel_outputs;
};

struct Layer {
    const void *norm, *head_norm, *mlp_norm;  // head_norm: [heads + kv_heads, dim], or null
    Product qkv, out, gate_up, down;
    float scale;
    int32_t reading;  // which of the step's
};

struct Model {
    const void *embedding;  // [vocabulary, width]
    const Layer *layers;
    const void *norm;
    Product head;
    int32_t layers_count, width, heads, kv_heads, dim;
    float epsilon;
};

// What layers with one window read.
struct Reading {
    const Read *reads;
    const int64_t *slots;
    int32_t count;
};

struct Step {
    const int64_t *tokens, *slots, *keep;
    const void *cosine, *sine;          // [rows, dim]
    void *const *keys, *const *values;  // of each layer
    int64_t keys_head, values_head;
    const Reading *readings;
    void *logits;                       // [keep_count, vocabulary]
    int32_t rows, keep_count, readings_count, threads;
};

namespace stack {

constexpr int TILE_ROWS = 8;  // from which on a tile that is half empty is quicker than none

// sums[R][V vectors] = rows[R][depth] times a panel's [depth][panel_width] from some column on.
template <typename Element, int R, int V>
inline void multiply(const float *rows, int depth, const float *panel, int panel_width, Lanes (*sums)[V]) {
    constexpr int CHAINS = R * V <= 4 ? 4 : R * V < 8 ? 2 : 1;  // additions that wait for each other are slow
    Lanes kept[CHAINS][R][V] = {};
    int place = 0;
    for (; place + CHAINS <= depth; place += CHAINS)
#pragma GCC unroll 4
        for (int chain = 0; chain < CHAINS; chain++) {
            Lanes some[V];
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) some[v] = load(panel + (int64_t)(place + chain) * panel_width + v * LANES);
#pragma GCC unroll 6
            for (int row = 0; row < R; row++) {
                Lanes one = all(rows[(int64_t)row * depth + place + chain]);
#pragma GCC unroll 4
                for (int v = 0; v < V; v++) kept[chain][row][v] = multiplied(kept[chain][row][v], one, some[v], Element());
            }
        }
    for (; place < depth; place++)
        for (int row = 0; row < R; row++)
            for (int v = 0; v < V; v++)
                kept[0][row][v] = multiplied(kept[0][row][v], all(rows[(int64_t)row * depth + place]),
                                             load(panel + (int64_t)place * panel_width + v * LANES), Element());
#pragma GCC unroll 6
    for (int row = 0; row < R; row++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            sums[row][v] = kept[0][row][v];
#pragma GCC unroll 4
            for (int chain = 1; chain < CHAINS; chain++) sums[row][v] += kept[chain][row][v];
        }
}

// out [rows, outputs] = in [rows, inputs] times the weight, and the bias. From all threads of a team; `in` has space
// for whole tiles of rows.
template <typename T, typename Element>
void multiply(const Product &product, const T *in, int rows, T *out) {
    constexpr bool pairs = std::is_same_v<Element, Pair>;
    int depth = pairs ? product.inputs / 2 : product.inputs, width = product.panel_outputs;
    int64_t panel_size = (int64_t)product.panel_inputs * width;
    const T *bias = (const T *)product.bias;
    auto put = [&](int row, int column, Lanes sums) {
        int count = std::min(LANES, product.outputs - column);
        if (count <= 0) return;
        T *to = out + (int64_t)row * product.outputs + column;
        if (bias) sums += count == LANES ? load(bias + column) : load_some(bias + column, count);
        store_at_most(to, sums, count);
    };
    share((product.outputs + width - 1) / width, [&](int64_t index) {
        const float *panel = (const float *)((const T *)product.panels + index * panel_size), *left = (const float *)in;
        int first = (int)index * width;
        if (pairs && rows >= TILE_ROWS && depth % tiles::PAIRS == 0 && tiles::allowed()) {
            static thread_local attention::Memory memory;
            int space = (rows + tiles::ROWS - 1) / tiles::ROWS * tiles::ROWS;
            float *sums = memory.floats((size_t)space * width);
            tiles::Setting setting(true);
            tiles::multiply<false>(left, depth, panel, depth, sums, space, width);
            for (int row = 0; row < rows; row++)
                for (int column = 0; column < width; column += LANES) put(row, first + column, load(sums + row * width + column));
            return;
        }
        attention::by_blocks(rows, [&](auto block, int row) {
            attention::by_columns(width, [&](auto vectors, int column) {
                Lanes sums[block.value][vectors.value];
                multiply<Element, block.value, vectors.value>(left + (int64_t)row * depth, depth, panel + column, width, sums);
                for (int some = 0; some < block.value; some++)
                    for (int v = 0; v < vectors.value; v++) put(row + some, first + column + v * LANES, sums[some][v]);
            });
        });
    });
}

// Rows of a step between two products, with space for whole tiles of them.
template <typename T>
class Buffers {
  public:
    Buffers(const Model &model, int rows) {
        int space = (rows + tiles::ROWS - 1) / tiles::ROWS * tiles::ROWS;
        const Layer &layer = model.layers[0];
        int widths[] = {model.width, model.width, model.width, layer.qkv.outputs, layer.out.inputs, layer.gate_up.outputs,
                        layer.down.inputs, model.width, layer.out.inputs};
        T **parts[] = {&hidden, &normed, &added, &qkv, &seen, &gate_up, &gated, &kept_hidden, &kept_seen};
        size_t all = 0;
        for (int width : widths) all += ((size_t)space * width + 31) / 32 * 32;
        static thread_local std::vector<T> memory;
        if (memory.size() < all + 32) memory.resize(all + 32);
        T *next = (T *)(((uintptr_t)memory.data() + 63) / 64 * 64);
        for (int part = 0; part < 9; part++) {
            *parts[part] = next;
            next += ((size_t)space * widths[part] + 31) / 32 * 32;
        }
    }

    T *hidden, *normed, *added, *qkv, *seen, *gate_up, *gated, *kept_hidden, *kept_seen;
};

inline Attention attention_of(const Model &model, const Step &step, const Layer &layer) {
    const Reading &reading = step.readings[layer.reading];
    Attention call = {};
    call.query_row = layer.qkv.outputs;
    call.query_head = model.dim;
    call.keys_head = step.keys_head;
    call.values_head = step.values_head;
    call.reads = reading.reads;
    call.slots = reading.slots;
    call.reads_count = reading.count;
    call.rows = step.rows;
    call.heads = model.heads;
    call.kv_heads = model.kv_heads;
    call.key_dim = call.value_dim = model.dim;
    call.scale = layer.scale;
    call.threads = step.threads;
    return call;
}

template <typename T, typename Element>
void run(const Model &model, const Step &step) {
    static thread_local std::vector<attention::Pieces> plans;
    static thread_local attention::Memory memory;
    plans.resize(step.readings_count);
    int64_t partial_floats = 0;
    for (int index = 0; index < model.layers_count; index++) {
        int reading = model.layers[index].reading;
        if (index && model.layers[index - 1].reading == reading) continue;
        plans[reading].plan(attention_of(model, step, model.layers[index]));
        partial_floats = std::max(partial_floats, plans[reading].partial_floats());
    }
    float *partials = memory.floats(partial_floats);
    Buffers<T> buffers(model, step.rows);
    const auto &planned = plans;
    in_team(step.threads, true, [&] {
        auto [hidden, normed, added, qkv, seen, gate_up, gated, kept_hidden, kept_seen] = buffers;
        int rows = step.rows;
        share(rows, [&](int64_t row) {
            const T *from = (const T *)model.embedding + step.tokens[row] * model.width;
            std::copy(from, from + model.width, hidden + row * model.width);
        });
        for (int index = 0; index < model.layers_count; index++) {
            const Layer &layer = model.layers[index];
            rows::norm(hidden, index ? added : nullptr, (const T *)layer.norm, normed, rows, model.width, model.epsilon);
            multiply<T, Element>(layer.qkv, normed, rows, qkv);
            Rotation rotation = {qkv,        step.cosine,     step.sine, layer.head_norm, step.keys[index], step.values[index],
                                 step.keys_head, step.values_head, step.slots, rows,      model.heads,      model.kv_heads,
                                 model.dim,  model.epsilon,   1};
            rows::rotate_and_write<T>(rotation);
            Attention call = attention_of(model, step, layer);
            call.query = qkv;
            call.keys = step.keys[index];
            call.values = step.values[index];
            call.out = seen;
            attention::attend<T, Element>(call, planned[layer.reading], partials);
            if (index == model.layers_count - 1) {  // the other rows' keys and values are written, and that was all
                rows = step.keep_count;
                share(rows, [&](int64_t row) {
                    const T *one = hidden + step.keep[row] * model.width, *other = seen + step.keep[row] * layer.out.inputs;
                    std::copy(one, one + model.width, kept_hidden + row * model.width);
                    std::copy(other, other + layer.out.inputs, kept_seen + row * layer.out.inputs);
                });
                if (!rows) return;
                hidden = kept_hidden;
                seen = kept_seen;
            }
            multiply<T, Element>(layer.out, seen, rows, added);
            rows::norm(hidden, added, (const T *)layer.mlp_norm, normed, rows, model.width, model.epsilon);
            multiply<T, Element>(layer.gate_up, normed, rows, gate_up);
            rows::gate(gate_up, gated, rows, layer.down.inputs);
            multiply<T, Element>(layer.down, gated, rows, added);
        }
        rows::norm(hidden, added, (const T *)model.norm, normed, rows, model.width, model.epsilon);
        multiply<T, Element>(model.head, normed, rows, (T *)step.logits);
    });
}

}  // namespace stack
