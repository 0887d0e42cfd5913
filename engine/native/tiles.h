// Products of pairs of 16 bits by the processor's matrix unit (Intel's AMX), if it has one.
#pragma once

#include "lanes.h"

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace tiles {

constexpr int ROWS = 16;   // of a tile
constexpr int PAIRS = 16;  // of a row, or numbers of 32 bits

#if defined(__AMX_BF16__) && defined(__linux__)

// Whether the system lets this process use the unit.
inline bool allowed() {
    static const bool granted = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    return granted;
}

// The unit set up for whole tiles while this lives, if wanted; then as it was before.
class Setting {
  public:
    explicit Setting(bool wanted) : wanted_(wanted) {
        if (!wanted) return;
        _tile_storeconfig(&before_);
        Configuration whole = {};
        whole.palette = 1;
        for (int tile = 0; tile < 8; tile++) {
            whole.bytes[tile] = 4 * PAIRS;
            whole.rows[tile] = ROWS;
        }
        _tile_loadconfig(&whole);
    }

    ~Setting() {
        if (!wanted_) return;
        if (before_.palette)
            _tile_loadconfig(&before_);
        else
            _tile_release();
    }

  private:
    struct alignas(64) Configuration {
        uint8_t palette, start_row, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    };

    bool wanted_;
    Configuration before_;
};

// sums[2 * ROWS][2 * PAIRS] (+)= left[2 * ROWS][depth pairs] times right[depth pairs][2 * PAIRS]; the half with odd
// rows or columns is left out where there is none. Widths are those of rows in memory, in numbers of 32 bits.
template <bool add, bool two_rows, bool two_columns>
inline void multiply(const float *left, int left_width, const float *right, int right_width, int depth, float *sums,
                     int sums_width) {
    float *sums_below = sums + ROWS * sums_width;
    asm volatile("" ::: "memory");  // what follows reads memory, which the compiler does not know
    if (add) {
        _tile_loadd(0, sums, 4 * sums_width);
        if (two_columns) _tile_loadd(1, sums + PAIRS, 4 * sums_width);
        if (two_rows) _tile_loadd(2, sums_below, 4 * sums_width);
        if (two_rows && two_columns) _tile_loadd(3, sums_below + PAIRS, 4 * sums_width);
    } else {
        _tile_zero(0);
        if (two_columns) _tile_zero(1);
        if (two_rows) _tile_zero(2);
        if (two_rows && two_columns) _tile_zero(3);
    }
    for (int place = 0; place < depth; place += PAIRS) {
        _tile_loadd(4, left + place, 4 * left_width);
        if (two_rows) _tile_loadd(5, left + ROWS * left_width + place, 4 * left_width);
        _tile_loadd(6, right + place * right_width, 4 * right_width);
        _tile_dpbf16ps(0, 4, 6);
        if (two_rows) _tile_dpbf16ps(2, 5, 6);
        if (two_columns) {
            _tile_loadd(7, right + place * right_width + PAIRS, 4 * right_width);
            _tile_dpbf16ps(1, 4, 7);
            if (two_rows) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, 4 * sums_width);
    if (two_columns) _tile_stored(1, sums + PAIRS, 4 * sums_width);
    if (two_rows) _tile_stored(2, sums_below, 4 * sums_width);
    if (two_rows && two_columns) _tile_stored(3, sums_below + PAIRS, 4 * sums_width);
}

#else

inline bool allowed() { return false; }

class Setting {
  public:
    explicit Setting(bool) {}
};

template <bool, bool, bool>
inline void multiply(const float *, int, const float *, int, int, float *, int) {}

#endif

// sums[rows][columns] (+)= left[rows][depth] times right[depth][columns], rows and columns being of whole tiles.
template <bool add>
inline void multiply(const float *left, int left_width, const float *right, int depth, float *sums, int rows, int columns) {
    for (int row = 0; row < rows; row += 2 * ROWS)
        for (int column = 0; column < columns; column += 2 * PAIRS) {
            const float *some = left + row * left_width, *others = right + column;
            float *to = sums + row * columns + column;
            bool two_rows = row + ROWS < rows, two_columns = column + PAIRS < columns;
            if (two_rows && two_columns)
                multiply<add, true, true>(some, left_width, others, columns, depth, to, columns);
            else if (two_rows)
                multiply<add, true, false>(some, left_width, others, columns, depth, to, columns);
            else if (two_columns)
                multiply<add, false, true>(some, left_width, others, columns, depth, to, columns);
            else
                multiply<add, false, false>(some, left_width, others, columns, depth, to, columns);
        }
}

}  // namespace tiles
