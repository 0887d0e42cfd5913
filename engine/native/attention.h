// Attention over a block pool. A call's reads say which rows see which slots; every row's keys may be spread over
// several reads, whose partial results are merged by the weights of their sums.
//
// Work is cut into tasks: some rows of a read with all query heads of one KV head (they use the same keys, so they
// are folded into the rows) over some of its keys, 64 at a time with a running maximum and sum (Milakov and
// Gimelshein 2018; Dao et al. 2022). So scores never leave the first level of the cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "lanes.h"
#include "team.h"
#include "tiles.h"

// Row first + i sees key j of the slots slots_begin..slots_end-1 if offset + i - window < j <= offset + i.
struct Read {
    int32_t first, last;
    int32_t slots_begin, slots_end;
    int32_t offset, window;
};

struct Attention {
    const void *query;            // [rows, heads, key_dim], by the two strides, in numbers
    int64_t query_row, query_head;
    const void *keys, *values;    // [kv_heads, slots, dim], by the strides of a head
    int64_t keys_head, values_head;
    void *out;                    // [rows, heads, value_dim]
    const float *sinks;           // [heads], or null
    const Read *reads;
    const int64_t *slots;
    int32_t reads_count, rows, heads, kv_heads, key_dim, value_dim;
    float scale, softcap;         // no cap if 0
    int32_t threads;
};

namespace attention {

constexpr int KEYS = 64;                     // of a tile
constexpr int KEY_VECTORS = KEYS / LANES;
constexpr int FOLDED_ROWS = 128;             // of a task, at least one row's heads
constexpr int BLOCK_ROWS = 6;                // whose sums stay in registers
constexpr int BLOCK_VECTORS = LANES == 16 ? 4 : 2;
constexpr int FEW_ROWS = 4;                  // for which keys are not transposed
constexpr int PIECE_KEYS = 128;              // at least, of a task
constexpr double ALONE = 1 << 18;            // multiplications that take less time than waking other threads
constexpr float NOTHING = -std::numeric_limits<float>::infinity();

inline int padded(int width) { return (width + LANES - 1) / LANES * LANES; }

// Memory for floats that is kept from call to call, aligned to lines of the cache.
class Memory {
  public:
    float *floats(size_t count) {
        if (kept_.size() < count + 16) kept_.resize(count + 16);
        return (float *)(((uintptr_t)kept_.data() + 63) / 64 * 64);
    }

  private:
    std::vector<float> kept_;
};

// Some rows of a read over some of its keys.
struct Piece {
    int read, first, last, begin, end;
    bool whole;       // there is no other piece for these rows
    int64_t partial;  // where the sums of the first head begin, if not whole
    double work;
};

// How many numbers an element has.
template <typename Element>
constexpr int PER_ELEMENT = std::is_same_v<Element, Pair> ? 2 : 1;

// LANES elements.
template <typename Element, typename T>
inline Lanes elements(const T *from) {
    if constexpr (std::is_same_v<Element, Pair>)
        return load((const float *)from);
    else
        return load(from);
}

template <int half>
inline void swap_halves(Lanes *square) {
    IntLanes low, high;
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; lane++) {
        low[lane] = lane & half ? LANES + lane - half : lane;
        high[lane] = lane & half ? LANES + lane : lane + half;
    }
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; lane++) {
        if (lane & half) continue;
        Lanes one = square[lane], other = square[lane + half];
        square[lane] = __builtin_shuffle(one, other, low);
        square[lane + half] = __builtin_shuffle(one, other, high);
    }
    if constexpr (half > 1) swap_halves<half / 2>(square);
}

// to[depth][KEYS] = the transpose of KEYS keys of `width` numbers, in elements. What is missing of whole vectors is zero.
template <typename Element, typename T>
inline void transpose(const T *const *keys, int width, float *to) {
    constexpr int whole = PER_ELEMENT<Element> * LANES;
    for (int place = 0; place < width; place += whole) {
        int part = std::min(whole, width - place);
        for (int group = 0; group < KEYS; group += LANES) {
            Lanes square[LANES];
            if (part == whole)
#pragma GCC unroll 16
                for (int lane = 0; lane < LANES; lane++) square[lane] = elements<Element>(keys[group + lane] + place);
            else
                for (int lane = 0; lane < LANES; lane++) {
                    T some[whole] = {};
                    std::memcpy(some, keys[group + lane] + place, part * sizeof(T));
                    square[lane] = elements<Element>(some);
                }
            swap_halves<LANES / 2>(square);
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; lane++)
                store(to + (place / PER_ELEMENT<Element> + lane) * KEYS + group, square[lane]);
        }
    }
}

// scores[R][KEYS] = query[R][depth] times keys[depth][KEYS].
template <typename Element, int R>
inline void multiply_keys(const float *query, const float *keys, int depth, float *scores) {
    for (int column = 0; column < KEYS; column += BLOCK_VECTORS * LANES) {
        Lanes sums[R][BLOCK_VECTORS] = {};
        for (int place = 0; place < depth; place++) {
            Lanes some[BLOCK_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < BLOCK_VECTORS; v++) some[v] = load(keys + place * KEYS + column + v * LANES);
#pragma GCC unroll 6
            for (int row = 0; row < R; row++) {
                Lanes one = all(query[row * depth + place]);
#pragma GCC unroll 4
                for (int v = 0; v < BLOCK_VECTORS; v++) sums[row][v] = multiplied(sums[row][v], one, some[v], Element());
            }
        }
#pragma GCC unroll 6
        for (int row = 0; row < R; row++)
#pragma GCC unroll 4
            for (int v = 0; v < BLOCK_VECTORS; v++) store(scores + row * KEYS + column + v * LANES, sums[row][v]);
    }
}

// The same for keys where they lie, which is quicker for few rows. `depth` is of whole vectors.
template <typename Element, typename T, int R>
inline void multiply_key_rows(const float *query, const T *const *keys, int depth, float *scores) {
    for (int group = 0; group < KEYS; group += LANES) {
        Lanes sums[R][LANES] = {};
        for (int place = 0; place < depth; place += LANES) {
            Lanes some[R];
#pragma GCC unroll 6
            for (int row = 0; row < R; row++) some[row] = load(query + row * depth + place);
#pragma GCC unroll 16
            for (int lane = 0; lane < LANES; lane++) {
                Lanes key = elements<Element>(keys[group + lane] + place * PER_ELEMENT<Element>);
#pragma GCC unroll 6
                for (int row = 0; row < R; row++) sums[row][lane] = multiplied(sums[row][lane], some[row], key, Element());
            }
        }
#pragma GCC unroll 6
        for (int row = 0; row < R; row++) store(scores + row * KEYS + group, sums_of(sums[row]));
    }
}

// sums[R][V vectors] = sums * decay[R] + weights[R][count] times the values, which `row_of` has, in elements.
template <typename Element, int R, int V, typename RowOf>
inline void add_values(const float *weights, int weights_width, RowOf row_of, int column, int count, const float *decay,
                       float *sums, int width) {
    Lanes kept[R][V];
#pragma GCC unroll 6
    for (int row = 0; row < R; row++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) kept[row][v] = load(sums + row * width + column + v * LANES) * decay[row];
    for (int place = 0; place < count; place++) {
        auto values = row_of(place);
        Lanes some[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) some[v] = load(values + column + v * LANES);
#pragma GCC unroll 6
        for (int row = 0; row < R; row++) {
            Lanes weight = all(weights[row * weights_width + place]);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) kept[row][v] = multiplied(kept[row][v], weight, some[v], Element());
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < R; row++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(sums + row * width + column + v * LANES, kept[row][v]);
}

// Calls block<V>(first column) for all columns of `width`, which is of whole vectors.
template <typename Block>
inline void by_columns(int width, Block block) {
    int column = 0;
    for (; column + BLOCK_VECTORS * LANES <= width; column += BLOCK_VECTORS * LANES)
        block(std::integral_constant<int, BLOCK_VECTORS>(), column);
    for (; column + 2 * LANES <= width; column += 2 * LANES) block(std::integral_constant<int, 2>(), column);
    for (; column < width; column += LANES) block(std::integral_constant<int, 1>(), column);
}

// Calls block<R>(first row) for all rows, BLOCK_ROWS at a time.
template <typename Block>
inline void by_blocks(int rows, Block block) {
    int row = 0;
    for (; row + BLOCK_ROWS <= rows; row += BLOCK_ROWS) block(std::integral_constant<int, BLOCK_ROWS>(), row);
    switch (rows - row) {
    case 5: return block(std::integral_constant<int, 5>(), row);
    case 4: return block(std::integral_constant<int, 4>(), row);
    case 3: return block(std::integral_constant<int, 3>(), row);
    case 2: return block(std::integral_constant<int, 2>(), row);
    case 1: return block(std::integral_constant<int, 1>(), row);
    }
}

// Rows of one KV head with what is known of them so far: maxima of scores, sums of powers of two, and sums of values.
// Element says what products are made of: numbers, or pairs of numbers of 16 bits.
template <typename T, typename Element>
class Rows {
    static constexpr bool pairs = std::is_same_v<Element, Pair>;

  public:
    Rows(const Attention &call, const Piece &piece, int kv_head, Memory &memory)
        : call_(call), read_(call.reads[piece.read]), piece_(piece), group_(call.heads / call.kv_heads),
          kv_head_(kv_head), count_((piece.last - piece.first) * group_), space_((count_ + 15) / 16 * 16),
          depth_(padded(pairs ? (call.key_dim + 1) / 2 : call.key_dim)), width_(padded(call.value_dim)),
          few_(count_ <= FEW_ROWS && depth_ * (pairs ? 2 : 1) == call.key_dim && width_ == call.value_dim),
          tiles_(pairs && !few_ && tiles::allowed()), factor_(call.softcap ? call.softcap * LOG2_E : call.scale * LOG2_E) {
        struct {
            float **place;
            size_t size;
        } parts[] = {{&query_, (size_t)space_ * depth_}, {&scores_, (size_t)space_ * KEYS}, {&sums_, (size_t)space_ * width_},
                     {&totals_, (size_t)space_ * LANES}, {&maxima_, (size_t)space_},        {&decays_, (size_t)space_},
                     {&found_, (size_t)space_},          {&keys_, few_ ? 0 : (size_t)depth_ * KEYS},
                     {&values_, few_ ? 0 : (size_t)KEYS * width_}, {&weights_, pairs && !few_ ? (size_t)space_ * KEYS / 2 : 0}};
        size_t all = 0;
        for (auto &part : parts) all += (part.size + 15) / 16 * 16;
        float *next = memory.floats(all);
        for (auto &part : parts) {
            *part.place = next;
            next += (part.size + 15) / 16 * 16;
        }
        std::fill(query_, query_ + space_ * depth_, 0.0f);
        for (int row = 0; row < count_; row++) {
            const T *from = (const T *)call.query + (piece.first + row / group_) * call.query_row +
                            (kv_head * group_ + row % group_) * call.query_head;
            copy_query(from, query_ + row * depth_);
        }
        std::fill(sums_, sums_ + space_ * width_, 0.0f);
        std::fill(totals_, totals_ + space_ * LANES, 0.0f);
        std::fill(maxima_, maxima_ + space_, NOTHING);
    }

    void see_keys() {
        const int64_t *slots = call_.slots + read_.slots_begin;
        const T *keys = (const T *)call_.keys + kv_head_ * call_.keys_head;
        const T *values = (const T *)call_.values + kv_head_ * call_.values_head;
        const T *key_rows[KEYS], *value_rows[KEYS];
        tiles::Setting setting(tiles_);
        for (int begin = piece_.begin; begin < piece_.end; begin += KEYS) {
            int count = std::min(KEYS, piece_.end - begin);
            for (int key = 0; key < KEYS; key++) {  // a last key stands for those that are missing, which are hidden
                int64_t slot = slots[begin + std::min(key, count - 1)];
                key_rows[key] = keys + slot * call_.key_dim;
                value_rows[key] = values + slot * call_.value_dim;
            }
            if (few_)
                by_blocks(count_, [&](auto rows, int row) {
                    multiply_key_rows<Element, T, rows.value>(query_ + row * depth_, key_rows, depth_, scores_ + row * KEYS);
                });
            else
                multiply_transposed(key_rows);
            if (call_.softcap) cap();
            hide(begin, count);
            weigh();
            if (few_)
                add(value_rows, count);
            else
                add_copied(value_rows, count);
        }
    }

    // Writes the sums [heads][rows][padded value_dim] of the group's heads, and the maxima and totals [heads][rows].
    void keep(float *sums, float *maxima, float *totals) const {
        int rows = count_ / group_;
        for (int row = 0; row < count_; row++) {
            int64_t place = (int64_t)(kv_head_ * group_ + row % group_) * rows + row / group_;
            std::copy(sums_ + row * width_, sums_ + (row + 1) * width_, sums + place * width_);
            maxima[place] = maxima_[row];
            totals[place] = sum(load(totals_ + row * LANES));
        }
    }

    void finish() const {
        for (int row = 0; row < count_; row++) {
            int head = kv_head_ * group_ + row % group_;
            float total = sum(load(totals_ + row * LANES));
            if (call_.sinks) total += std::exp2(call_.sinks[head] * LOG2_E - maxima_[row]);
            T *to = (T *)call_.out + ((int64_t)(piece_.first + row / group_) * call_.heads + head) * call_.value_dim;
            const float *from = sums_ + row * width_;
            float share = 1.0f / total;
            for (int column = 0; column < call_.value_dim; column += LANES)
                store_at_most(to + column, load(from + column) * share, call_.value_dim - column);
        }
    }

  private:
    void copy_query(const T *from, float *to) {
        if constexpr (pairs)
            std::memcpy(to, from, call_.key_dim * sizeof(T));
        else
            for (int place = 0; place < call_.key_dim; place++) to[place] = number(from[place]);
    }

    void multiply_transposed(const T *const *keys) {
        transpose<Element>(keys, call_.key_dim, keys_);
        if (tiles_) return tiles::multiply<false>(query_, depth_, keys_, depth_, scores_, space_, KEYS);
        by_blocks(count_, [&](auto rows, int row) {
            multiply_keys<Element, rows.value>(query_ + row * depth_, keys_, depth_, scores_ + row * KEYS);
        });
    }

    void cap() {
        float share = call_.scale / call_.softcap;
        for (int place = 0; place < count_ * KEYS; place += LANES) store(scores_ + place, tanh(load(scores_ + place) * share));
    }

    void hide(int begin, int count) {
        int first = piece_.first - read_.first + read_.offset - begin;  // the last key that the first row sees
        int rows = count_ / group_;
        if (count == KEYS && first >= KEYS - 1 && first + rows - 1 - (int64_t)read_.window < 0) return;
        for (int row = 0; row < count_; row++) {
            int last = first + row / group_;
            int from = (int)std::min<int64_t>(std::max<int64_t>((int64_t)last - read_.window + 1, 0), KEYS);
            int to = std::max(std::min(last + 1, count), 0);
            std::fill(scores_ + row * KEYS, scores_ + row * KEYS + from, NOTHING);
            std::fill(scores_ + row * KEYS + to, scores_ + (row + 1) * KEYS, NOTHING);
        }
    }

    // Turns scores into weights relative to the largest score so far, and says by how much older sums decay.
    void weigh() {
        for (int row = 0; row < count_; row++) {
            Lanes found = load(scores_ + row * KEYS);
            for (int v = 1; v < KEY_VECTORS; v++) found = larger(found, load(scores_ + row * KEYS + v * LANES));
            found_[row] = largest(found);
        }
        for (int row = 0; row < space_; row += LANES) {
            Lanes before = load(maxima_ + row), now = larger(before, load(found_ + row) * factor_);
            store(maxima_ + row, now);
            Lanes reference = now == NOTHING ? Lanes{} : now;  // a row that has seen nothing yet
            store(found_ + row, reference);
            store(decays_ + row, exp2(before - reference));
        }
        bool rounding = pairs && !few_;
        for (int row = 0; row < count_; row++) {
            float *scores = scores_ + row * KEYS;
            [[maybe_unused]] Bfloat16 *weights = (Bfloat16 *)(weights_ + row * KEYS / 2);
            Lanes total = load(totals_ + row * LANES) * decays_[row], factor = all(factor_), reference = all(found_[row]);
            Lanes some[KEY_VECTORS];
#pragma GCC unroll 4
            for (int v = 0; v < KEY_VECTORS; v++) some[v] = exp2(load(scores + v * LANES) * factor - reference);
            if (rounding) {
#pragma GCC unroll 4
                for (int v = 0; v < KEY_VECTORS; v++) {
                    HalfLanes halves = rounded(some[v]);
                    store(weights + v * LANES, halves);
                    total += widened(halves);  // so that what rounding loses is not lost a second time
                }
            } else {
#pragma GCC unroll 4
                for (int v = 0; v < KEY_VECTORS; v++) {
                    store(scores + v * LANES, some[v]);
                    total += some[v];
                }
            }
            store(totals_ + row * LANES, total);
        }
    }

    template <typename V>
    void add(const V *const *values, int count) {
        add<float>(scores_, KEYS, [=](int key) { return values[key]; }, count);
    }

    template <typename Product, typename RowOf>
    void add(const float *weights, int weights_width, RowOf row_of, int count) {
        by_blocks(count_, [&](auto rows, int row) {
            by_columns(width_, [&](auto vectors, int column) {
                add_values<Product, rows.value, vectors.value>(weights + row * weights_width, weights_width, row_of, column,
                                                               count, decays_ + row, sums_ + row * width_, width_);
            });
        });
    }

    void add_copied(const T *const *values, int count) {
        if constexpr (pairs) {
            interleave(values, count);
            if (tiles_) {
                int width = width_;
                float *sums = sums_;
                for (int row = 0; row < count_; row++, sums += width) {
                    Lanes decay = all(decays_[row]);
                    for (int column = 0; column < width; column += LANES) store(sums + column, load(sums + column) * decay);
                }
                return tiles::multiply<true>(weights_, KEYS / 2, values_, KEYS / 2, sums_, space_, width_);
            }
            add<Pair>(weights_, KEYS / 2, [=](int pair) { return values_ + pair * width_; }, KEYS / 2);
        } else if (std::is_same_v<T, float> && width_ == call_.value_dim) {
            add(values, count);
        } else {
            const float *copies[KEYS];
            for (int key = 0; key < count; key++) {
                float *to = values_ + key * width_;
                by_vectors(values[key], [&](int column, Lanes lanes) { store(to + column, lanes); });
                copies[key] = to;
            }
            add(copies, count);
        }
    }

    // values_[KEYS / 2][width] = pairs of the values of two keys. Those that are missing are zero, not just any number.
    void interleave(const T *const *values, int count) {
        for (int key = 0; key < KEYS; key += 2) {
            float *to = values_ + key / 2 * width_;
            auto first = [&](int column, Lanes lanes) { store(to + column, (Lanes)((BitLanes)lanes >> 16)); };
            auto second = [&](int column, Lanes lanes) {
                store(to + column, (Lanes)((BitLanes)load(to + column) | (BitLanes)lanes));
            };
            if (key < count)
                by_vectors(values[key], first);
            else
                std::fill(to, to + width_, 0.0f);
            if (key + 1 < count) by_vectors(values[key + 1], second);
        }
    }

    // Calls see(column, numbers) for all columns, with zeros behind the last.
    template <typename See>
    void by_vectors(const T *from, See see) const {
        int column = 0;
        for (; column + LANES <= call_.value_dim; column += LANES) see(column, load(from + column));
        if (column < width_) see(column, load_some(from + column, call_.value_dim - column));
    }

    const Attention &call_;
    const Read &read_;
    const Piece &piece_;
    int group_, kv_head_, count_, space_, depth_, width_;
    bool few_, tiles_;
    float factor_;
    float *query_, *scores_, *keys_, *values_, *weights_, *sums_, *totals_, *maxima_, *decays_, *found_;
};

// All pieces of a call, the largest first, and which of them each row has.
class Pieces {
  public:
    void plan(const Attention &call) {
        pieces_.clear();
        int group = call.heads / call.kv_heads;
        int tile = std::max(FOLDED_ROWS / group, 1);
        double per_key = (double)group * (call.key_dim + call.value_dim);
        total_ = 0;
        for (int index = 0; index < call.reads_count; index++) {
            const Read &read = call.reads[index];
            for (int first = read.first; first < read.last; first += tile) {
                int last = std::min(first + tile, read.last);
                int64_t begin = std::max<int64_t>((int64_t)read.offset + first - read.first - read.window + 1, 0);
                int64_t end = std::min<int64_t>((int64_t)read.offset + last - read.first, read.slots_end - read.slots_begin);
                double work = per_key * (last - first) * (end - begin);
                pieces_.push_back({index, first, last, (int)begin, (int)end, false, 0, work});
                total_ += work;
            }
        }
        total_ *= call.kv_heads;
        if (call.threads > 1 && worth_a_team()) cut(call);
        std::sort(pieces_.begin(), pieces_.end(), [](const Piece &one, const Piece &other) { return one.work > other.work; });
        spread(call);
    }

    bool worth_a_team() const { return total_ > ALONE; }

    const std::vector<Piece> &pieces() const { return pieces_; }
    int64_t partial_floats() const { return partial_floats_; }
    const std::vector<int> &begins() const { return begins_; }
    const std::vector<int> &of_rows() const { return of_rows_; }
    const std::vector<int> &merged() const { return merged_; }

  private:
    // Cuts large pieces so that all threads have something to do until the end.
    void cut(const Attention &call) {
        double target = total_ / call.kv_heads / call.threads / 2;
        size_t count = pieces_.size();
        for (size_t index = 0; index < count; index++) {
            Piece piece = pieces_[index];
            int keys = piece.end - piece.begin;
            int parts = std::min((int)(piece.work * call.kv_heads / target / 2 + 0.5), keys / PIECE_KEYS);
            if (parts < 2) continue;
            int length = (keys / parts + KEYS - 1) / KEYS * KEYS;
            for (int begin = piece.begin; begin < piece.end; begin += length) {
                Piece part = piece;
                part.begin = begin;
                part.end = std::min(begin + length, piece.end);
                part.work = piece.work * (part.end - part.begin) / keys;
                if (begin == piece.begin)
                    pieces_[index] = part;
                else
                    pieces_.push_back(part);
            }
        }
    }

    void spread(const Attention &call) {
        begins_.assign(call.rows + 1, 0);
        for (const Piece &piece : pieces_)
            for (int row = piece.first; row < piece.last; row++) begins_[row + 1]++;
        merged_.clear();
        for (Piece &piece : pieces_) {
            piece.whole = true;
            for (int row = piece.first; row < piece.last; row++) piece.whole = piece.whole && begins_[row + 1] == 1;
        }
        for (int row = 0; row < call.rows; row++) begins_[row + 1] += begins_[row];
        of_rows_.resize(begins_[call.rows]);
        next_.assign(begins_.begin(), begins_.end() - 1);
        partial_floats_ = 0;
        int64_t per_row = (int64_t)call.heads * (padded(call.value_dim) + 2);
        for (size_t index = 0; index < pieces_.size(); index++) {
            Piece &piece = pieces_[index];
            if (piece.whole) continue;
            piece.partial = partial_floats_;
            partial_floats_ += ((piece.last - piece.first) * per_row + 15) / 16 * 16;
            for (int row = piece.first; row < piece.last; row++) {
                if (next_[row] == begins_[row]) merged_.push_back(row);
                of_rows_[next_[row]++] = (int)index;
            }
        }
    }

    std::vector<Piece> pieces_;
    std::vector<int> begins_, next_, of_rows_, merged_;
    int64_t partial_floats_ = 0;
    double total_ = 0;
};

template <typename T>
inline void merge(const Attention &call, const Pieces &pieces, const float *partials, int row) {
    int width = padded(call.value_dim);
    for (int head = 0; head < call.heads; head++) {
        auto each = [&](auto see) {
            for (int entry = pieces.begins()[row]; entry < pieces.begins()[row + 1]; entry++) {
                const Piece &piece = pieces.pieces()[pieces.of_rows()[entry]];
                int64_t rows = piece.last - piece.first, place = head * rows + row - piece.first;
                const float *sums = partials + piece.partial, *maxima = sums + call.heads * rows * width;
                see(sums + place * width, maxima[place], maxima[call.heads * rows + place]);
            }
        };
        float largest = NOTHING, total = 0;
        each([&](const float *, float maximum, float) { largest = std::max(largest, maximum); });
        each([&](const float *, float maximum, float some) { total += std::exp2(maximum - largest) * some; });
        if (call.sinks) total += std::exp2(call.sinks[head] * LOG2_E - largest);
        T *to = (T *)call.out + ((int64_t)row * call.heads + head) * call.value_dim;
        for (int column = 0; column < width; column += LANES) {
            Lanes sums = {};
            each([&](const float *some, float maximum, float) {
                sums += load(some + column) * (std::exp2(maximum - largest) / total);
            });
            store_at_most(to + column, sums, call.value_dim - column);
        }
    }
}

// From all threads of a team. `partials` holds what `pieces` asks for.
template <typename T, typename Element>
void attend(const Attention &call, const Pieces &pieces, float *partials) {
    share_unequal((int64_t)pieces.pieces().size() * call.kv_heads, [&](int64_t task) {
        static thread_local Memory memory;
        const Piece &piece = pieces.pieces()[task / call.kv_heads];
        Rows<T, Element> rows(call, piece, task % call.kv_heads, memory);
        rows.see_keys();
        if (piece.whole) return rows.finish();
        int64_t count = (int64_t)call.heads * (piece.last - piece.first);
        float *sums = partials + piece.partial, *maxima = sums + count * padded(call.value_dim);
        rows.keep(sums, maxima, maxima + count);
    });
    share(pieces.merged().size(), [&](int64_t index) { merge<T>(call, pieces, partials, pieces.merged()[index]); });
}

template <typename T, typename Element>
void run(const Attention &call) {
    static thread_local Pieces pieces;
    static thread_local Memory memory;
    pieces.plan(call);
    const Pieces &planned = pieces;
    float *partials = memory.floats(planned.partial_floats());
    in_team(call.threads, planned.worth_a_team(), [&] { attend<T, Element>(call, planned, partials); });
}

}  // namespace attention
