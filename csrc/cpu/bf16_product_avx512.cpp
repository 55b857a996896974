// out = a b^T by vdpbf16ps, which multiplies pairs of neighbours along K and adds both products to an fp32 sum. Factors are
// packed pair by pair: a block of b at a time, and beside it one of a, which stay in the second cache.
#include <immintrin.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>

#include "bf16_product.h"

namespace dil {
namespace {

constexpr int kVectors = kProductColumns / 16;  // of 16 sums, a row
// At most this much is packed at once.
constexpr int64_t kBlockK = 576, kBlockColumns = 576, kBlockRows = 96;

// `size` in equal parts of at most `most`, each but the last a multiple of `unit`.
int64_t equal_part(int64_t size, int64_t most, int64_t unit) {
  const int64_t parts = (size + most - 1) / most;
  return parts <= 1 ? most : (size + parts * unit - 1) / (parts * unit) * unit;
}

__mmask32 first_halves(int64_t n) { return n >= 32 ? ~__mmask32{0} : (__mmask32{1} << n) - 1; }
__mmask16 first_words(int64_t n) { return n >= 16 ? static_cast<__mmask16>(~0) : static_cast<__mmask16>((1 << n) - 1); }

// 16 rows of 16 words to 16 columns.
void transpose(__m512i v[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    v[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    v[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    v[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    v[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  // Now v[i + j] has columns j, 4 + j, 8 + j and 12 + j of rows i to i + 3.
  for (int j = 0; j < 4; ++j) {
    const __m512i even_above = _mm512_shuffle_i32x4(v[j], v[4 + j], 0x88),
                  odd_above = _mm512_shuffle_i32x4(v[j], v[4 + j], 0xdd);
    const __m512i even_below = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0x88);
    const __m512i odd_below = _mm512_shuffle_i32x4(v[8 + j], v[12 + j], 0xdd);
    t[j] = _mm512_shuffle_i32x4(even_above, even_below, 0x88);
    t[4 + j] = _mm512_shuffle_i32x4(odd_above, odd_below, 0x88);
    t[8 + j] = _mm512_shuffle_i32x4(even_above, even_below, 0xdd);
    t[12 + j] = _mm512_shuffle_i32x4(odd_above, odd_below, 0xdd);
  }
  std::copy(t, t + 16, v);
}

// Rows of a factor, K of each, packed in panels of `width`: word (pair, i) of a panel has two neighbours along K, 0 beyond.
// What is contiguous is read to its end before the next: rows at a distance of some 4 KB share few places in a cache. What
// comes later is fetched ahead, also beyond the end of a factor, which does no harm.
void pack(const Bf16Factor& f, int64_t count, int64_t K, int64_t width, uint32_t* out) {
  constexpr int64_t kRowsAhead = 16;
  const int64_t pairs = (K + 1) / 2, step = std::min<int64_t>(width, 16);
  const auto place = [&](int64_t i) { return out + i / width * width * pairs + i % width; };
  const auto fetch = [&](int64_t i, int64_t k) {
    _mm_prefetch(reinterpret_cast<const char*>(f.data + i * f.stride + k * f.k_stride), _MM_HINT_T0);
  };
  if (f.stride == 1) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const uint16_t* const x = f.data + 2 * pair * f.k_stride;
      const bool both = 2 * pair + 1 < K;
      for (int64_t i = 0; i < count; i += step) {
        const __mmask16 rows = first_words(std::min(count - i, step));
        fetch(i, 2 * pair + kRowsAhead);
        fetch(i, 2 * pair + kRowsAhead + 1);
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(rows, x + i));
        const __m512i odd = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(both ? rows : 0, x + both * f.k_stride + i));
        _mm512_mask_storeu_epi32(place(i) + pair * width, rows, _mm512_or_si512(even, _mm512_slli_epi32(odd, 16)));
      }
    }
    return;
  }
  for (int64_t i = 0; i < count; i += step) {
    const int64_t size = std::min(count - i, step);
    const __mmask16 rows = first_words(size);
    uint32_t* to = place(i);
    for (int64_t k = 0; k < K; k += 32) {
      __m512i v[16];
      for (int64_t r = 0; r < size; ++r) fetch(i + step + r, k);
      for (int64_t r = 0; r < 16; ++r) {
        v[r] =
            r < size ? _mm512_maskz_loadu_epi16(first_halves(K - k), f.data + (i + r) * f.stride + k) : _mm512_setzero_si512();
      }
      transpose(v);
      const int64_t there = std::min<int64_t>((K - k + 1) / 2, 16);
      for (int64_t pair = 0; pair < there; ++pair, to += width) _mm512_mask_storeu_epi32(to, rows, v[pair]);
    }
  }
}

// Up to `rows` rows and 64 columns of out.
template <int rows>
void multiply(const ProductOutput& out, const uint32_t* a, const uint32_t* b, int64_t pairs, int64_t columns) {
  __m512 sums[rows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) sums[r][c] = _mm512_setzero_ps();
  }
  for (int64_t k = 0; k < pairs; ++k, a += kProductRows, b += kProductColumns) {
    __m512bh factors[kVectors];
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) factors[c] = (__m512bh)_mm512_loadu_si512(b + 16 * c);
#pragma GCC unroll 8
    for (int r = 0; r < rows; ++r) {
      const __m512bh factor = (__m512bh)_mm512_set1_epi32(static_cast<int>(a[r]));
#pragma GCC unroll 8
      for (int c = 0; c < kVectors; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], factor, factors[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int c = 0; c < kVectors; ++c) {
      if (16 * c >= columns) continue;
      float* to = out.data + r * out.stride + 16 * c;
      const __mmask16 mask = first_words(columns - 16 * c);
      const __m512 before = out.add ? _mm512_maskz_loadu_ps(mask, to) : _mm512_setzero_ps();
      _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(before, sums[r][c]));
    }
  }
}

using Multiply = void (*)(const ProductOutput&, const uint32_t*, const uint32_t*, int64_t, int64_t);
constexpr Multiply kMultiply[kProductRows] = {multiply<1>, multiply<2>, multiply<3>, multiply<4>, multiply<5>, multiply<6>};

struct Free {
  void operator()(uint32_t* data) const { std::free(data); }
};

}  // namespace

void bf16_product_avx512(ProductOutput out, Bf16Factor a, Bf16Factor b, int64_t M, int64_t N, int64_t K) {
  constexpr int64_t kPairs = kBlockK / 2;
  const std::unique_ptr<uint32_t, Free> buffer(
      static_cast<uint32_t*>(std::aligned_alloc(64, kPairs * (kBlockColumns + kBlockRows) * sizeof(uint32_t))));
  if (!buffer) throw std::bad_alloc();
  uint32_t* const packed_b = buffer.get();
  uint32_t* const packed_a = packed_b + kPairs * kBlockColumns;
  const int64_t block_k = equal_part(K, kBlockK, 32), block_columns = equal_part(N, kBlockColumns, kProductColumns);
  const auto part = [](const Bf16Factor& f, int64_t i, int64_t k) {
    return Bf16Factor{f.data + i * f.stride + k * f.k_stride, f.stride, f.k_stride};
  };
  for (int64_t n = 0; n < N; n += block_columns) {
    const int64_t columns = std::min(block_columns, N - n);
    int64_t k = 0;
    do {  // once for K = 0, too, whose product is 0
      const int64_t depth = std::min(block_k, K - k), pairs = (depth + 1) / 2;
      pack(part(b, n, k), columns, depth, kProductColumns, packed_b);
      for (int64_t block = 0; block < M; block += kBlockRows) {
        const int64_t end = std::min(block + kBlockRows, M);
        pack(part(a, block, k), end - block, depth, kProductRows, packed_a);
        for (int64_t m = block; m < end; m += kProductRows) {
          const int64_t rows = std::min(kProductRows, end - m);
          for (int64_t c = 0; c < columns; c += kProductColumns) {
            const ProductOutput to{out.data + m * out.stride + n + c, out.stride, out.add || k > 0};
            kMultiply[rows - 1](to, packed_a + (m - block) * pairs, packed_b + c * pairs, pairs, columns - c);
          }
        }
      }
      k += block_k;
    } while (k < K);
  }
}

}  // namespace dil
