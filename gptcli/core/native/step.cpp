// One decoding step on a CPU: the twin of core/model.py for a new token in each row, or some. Names and letters are the
// same there.
//
// A step of one token reads every weight once and does little else, so it is as fast as the weights come from memory.
// They are packed in the order in which they are read (see Matrix; core/native.py does it), and whatever else costs
// time is left out: no operators, no temporary tensors, and threads that wait for each other only where one needs what
// another has made.
//
// Everything is written once, for registers of any width. Some instructions are used where the CPU has them, and
// elsewhere done with ordinary ones: dot products of four bytes (AVX-512 VNNI), and of two bfloat16 (AVX-512 BF16), or of
// many (AMX, see tiles.h).
//
// core/native_build.py compiles this file on the machine that runs it; core/native.py calls it through ctypes.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#define GPTCLI_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX2__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

constexpr int GROUP = 32;  // columns that share a scale; every matrix is padded with zeros to a multiple of them

#define GPTCLI_API extern "C" __attribute__((visibility("default")))

// What core/native.py fills in. Whoever changes a struct counts ABI up, here and there.

constexpr int ABI = 4;

enum Type : int32_t { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3 };
enum Activation : int32_t { GELU_TANH = 0, GELU = 1, RELU = 2, SILU = 3 };

// A matrix [rows, columns], padded with zeros to multiples of LANES and GROUP. LANES rows make a panel, one row a lane.
// A panel is stored column after column, so a step reads memory from front to back. A lane has 32 bits each time:
// one float32, two bfloat16, four int8 (plus 128) or eight int4 (plus 8; columns 0-3 in the low halves of four bytes,
// columns 4-7 in the high ones).
struct Matrix {
    const void* weight;   // null: there is no such matrix
    const void* scale;    // int8: float [rows]; int4: bfloat16 [panels, columns / GROUP, LANES]
    const float* bias;    // [rows], or null
    int32_t rows, columns;
    int32_t type, unused;
};

struct Norm {
    const float* weight;  // padded as the columns of a matrix
    const float* bias;    // the same, or null
};

struct Layer {
    Norm attention_norm, mlp_norm;
    Norm query_norm, key_norm;  // RMS norms, or null
    int32_t window;             // tokens that a query sees at most, itself the last; 0: all
    int32_t rotated;            // whether queries and keys turn
    Matrix query, key, value, output, gate, up, down;
};

struct Model {
    int32_t layers, width, heads, kv_heads, head_dim, mlp_width, vocab, threads;
    int32_t rms, activation;
    int32_t rope_dim;          // R: the first numbers of each head, which turn
    int32_t parallel;          // whether the MLP reads what attention reads
    int32_t norm_output;       // whether norms are of what attention and the MLP made, and not of what they read
    int32_t qk_norm;           // of queries and keys: 0 none, 1 of each head, 2 of all heads as one
    int32_t original_context;  // tokens beyond which frequencies depend on the position ("dynamic"); 0: they never do
    int32_t table_type;        // FLOAT32 or BFLOAT16
    float eps;
    float rope_size;           // by what rotated vectors grow
    float rope_factor;         // of "dynamic"
    const void* embedding;     // [V, C]
    const void* positions;     // [context, C], or null
    const float* frequencies;  // [R / 2]: how fast a pair of dimensions turns; null without rotary positions
    Norm norm;
    Matrix unembedding;
    const Layer* blocks;
};

namespace {

// --- Vectors of LANES numbers. Operators work lane by lane; a product with a sum becomes one instruction.

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));
typedef uint16_t bfloat16;

template <class V> inline V load(const void* from) { V v; std::memcpy(&v, from, sizeof v); return v; }
template <class V> inline void store(void* to, V v) { std::memcpy(to, &v, sizeof v); }
inline Floats same(float x) { return x - Floats{}; }
inline Floats as_float(Ints x) { return __builtin_convertvector(x, Floats); }
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

inline Ints lanes() {
    Ints v{};
    for (int i = 0; i < LANES; i++) v[i] = i;
    return v;
}

// The first so many lanes, zeros for the others.
inline Floats first(int count, Floats v) { return lanes() < count ? v : Floats{}; }

inline float total(Floats v) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)v);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
#endif
}

// The totals of four at once.
inline void totals(const Floats (&v)[4], float* to) {
#if defined(__AVX512F__)
    __m256 half[4];
    for (int i = 0; i < 4; i++) half[i] = _mm256_add_ps(_mm512_castps512_ps256((__m512)v[i]), (__m256)_mm512_extractf64x4_pd((__m512d)v[i], 1));
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(half[0], half[1]), _mm256_hadd_ps(half[2], half[3]));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
#else
    for (int i = 0; i < 4; i++) to[i] = total(v[i]);
#endif
}

inline float largest(Floats v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = std::max(most, v[i]);
    return most;
}

// Numbers as they are kept, float or bfloat16, to float32 and back (to the nearest, ties to even).
inline Floats wide(const float* from) { return load<Floats>(from); }
inline Floats wide(const bfloat16* from) {
#if defined(__AVX512F__)  // compilers find a longer way
    return (Floats)_mm512_slli_epi32(_mm512_cvtepu16_epi32(load<__m256i>(from)), 16);
#else
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
#endif
}
inline float wide_one(float x) { return x; }
inline float wide_one(bfloat16 x) { const uint32_t bits = uint32_t(x) << 16; float f; std::memcpy(&f, &bits, 4); return f; }
inline void narrow(float x, float* to) { *to = x; }
inline void narrow(float x, bfloat16* to) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    *to = bfloat16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

// As ``wide``, where fewer than LANES numbers may be left: nothing behind them is read.
template <class T> inline Floats wide_first(int count, const T* from) {
    if (count >= LANES) return wide(from);
    Floats v{};
    for (int i = 0; i < count; i++) v[i] = wide_one(from[i]);
    return v;
}
inline void store_first(int count, float* to, Floats v) {
    if (count >= LANES) store(to, v);
    else for (int i = 0; i < count; i++) to[i] = v[i];
}

// exp(x) to 2 units in the last place: 2^n times a polynomial in the rest (coefficients: Cephes, expf).
inline Floats exponential(Floats x) {
    x = x < -87.f ? same(-87.f) : x > 88.f ? same(88.f) : x;
    const float round = 12582912.f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    const Floats shifted = x * 1.44269504f + round, n = shifted - round;
    const Floats r = x - n * 0.693359375f - n * -2.12194440e-4f;
    Floats y = same(1.9875691500e-4f);
    for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) y = y * r + c;
    y = y * (r * r) + r + 1.f;
    return y * (Floats)(((Ints)shifted + 127) << 23);  // what is above the low bits leaves at the top
}

inline Floats sigmoid(Floats x) { return 1.f / (1.f + exponential(-x)); }

inline Floats activate(Floats x, int kind) {
    switch (kind) {
        case RELU: return larger(x, Floats{});
        case SILU: return x * sigmoid(x);
        case GELU_TANH: return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x));  // (1 + tanh(u)) / 2 = sigmoid(2u)
        default:
            for (int i = 0; i < LANES; i++) x[i] *= 0.5f * (1.f + std::erf(x[i] * 0.70710678f));
            return x;
    }
}

// --- Matrix times vector

inline int up(int n, int to) { return (n + to - 1) / to * to; }

// The vectors [B, columns] that a matrix is about to multiply, padded with zeros: as they are, and, where the CPU
// multiplies such, rounded to the type of the weights.
struct Inputs {
    const float* x = nullptr;     // [B, stride]
    int stride = 0;
    int widest = 0;               // columns there is room for below
    std::vector<float> normed;    // [B, widest]: what x points to behind a norm
    std::vector<bfloat16> halves; // [B, widest]
    std::vector<int8_t> bytes;    // [B, widest], in groups of GROUP columns that share
    std::vector<float> scale;     // [B, widest / GROUP] their scale; their sums, for weights that are stored plus 128:
    std::vector<int32_t> sum;     // [B, widest / GROUP]

    void room(int batch, int columns) {
        widest = columns;
        normed.assign(size_t(batch) * columns, 0.f);
        halves.assign(size_t(batch) * columns, 0);
        bytes.assign(size_t(batch) * columns, 0);
        scale.assign(size_t(batch) * columns / GROUP, 0.f);
        sum.assign(size_t(batch) * columns / GROUP, 0);
    }

    void take(const float* from, int from_stride, int batch, [[maybe_unused]] const Matrix& m) {
        x = from;
        stride = from_stride;
        for (int b = 0; b < batch; b++) {
#if defined(__AVX512BF16__)
            if (m.type == BFLOAT16)
                for (int i = 0; i < m.columns; i++) narrow(x[size_t(b) * stride + i], &halves[size_t(b) * widest + i]);
#endif
#if defined(__AVX512VNNI__)
            if (m.type == INT8 || m.type == INT4)
                for (int g = 0; g < m.columns / GROUP; g++) round_group(b, g);
#endif
        }
    }

private:
    void round_group(int b, int g) {
        const float* from = x + size_t(b) * stride + g * GROUP;
        Floats most{};
        for (int i = 0; i < GROUP; i += LANES) most = larger(most, larger(wide(from + i), -wide(from + i)));
        const float peak = largest(most), inverse = peak > 0 ? 127.f / peak : 0.f;
        Ints together{};
        for (int i = 0; i < GROUP; i += LANES) {
            const Ints q = (Ints)(wide(from + i) * inverse + 12582912.f) - 0x4B400000;  // to the nearest integer
            store(&bytes[size_t(b) * widest + g * GROUP + i], __builtin_convertvector(q, Bytes));
            together += q;
        }
        int32_t s = 0;
        for (int i = 0; i < LANES; i++) s += together[i];
        scale[(size_t(b) * widest) / GROUP + g] = peak / 127.f;
        sum[(size_t(b) * widest) / GROUP + g] = s;
    }
};

inline int32_t word(const void* from) { int32_t w; std::memcpy(&w, from, 4); return w; }

#if defined(__AVX512VNNI__)
// To each lane of sum, the dot product of its four bytes of weights (0 to 255) with four inputs (-127 to 127).
inline Ints add_dot4(Ints sum, Ints weights, int32_t inputs) {
    return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32(inputs));
}
#endif

// One panel of a matrix times R rows of the inputs, from row b on: out[r] holds LANES results of row b + r.
//
// What a row gives does not depend on how many are computed with it: each adds up in the same order, whatever R is. So a
// text is the same alone and in company, and tokens that are looked at together are what they are one by one.

constexpr int WAYS = 4;  // so many sums apart, of floats: an addition need not wait for the one before
constexpr int MOST_FLOAT_ROWS = LANES == 16 ? 4 : 2;  // whose sums fit the registers
constexpr int MOST_ROWS = 8;

template <int R> inline void add_ways(const Floats (&sum)[WAYS][R], Floats (&out)[R]) {
    for (int r = 0; r < R; r++) out[r] = ((sum[0][r] + sum[1][r]) + sum[2][r]) + sum[3][r];
}

template <int R> void product_float32(const Matrix& m, int panel, const Inputs& in, int b, Floats (&out)[R]) {
    const float* w = (const float*)m.weight + size_t(panel) * m.columns * LANES;
    const float* x = in.x + size_t(b) * in.stride;
    Floats sum[WAYS][R] = {};
    for (int k = 0; k < m.columns; k += WAYS)
        for (int j = 0; j < WAYS; j++) {
            const Floats weights = wide(w + size_t(k + j) * LANES);
            for (int r = 0; r < R; r++) sum[j][r] += weights * x[size_t(r) * in.stride + k + j];
        }
    add_ways(sum, out);
}

template <int R> void product_bfloat16(const Matrix& m, int panel, const Inputs& in, int b, Floats (&out)[R]) {
    const bfloat16* w = (const bfloat16*)m.weight + size_t(panel) * m.columns * LANES;
    Floats sum[WAYS][R] = {};
    for (int k = 0; k < m.columns; k += 2 * WAYS)
        for (int j = 0; j < WAYS; j++) {
            const int column = k + 2 * j;
            const Words pair = load<Words>(w + size_t(column) * LANES);
#if defined(__AVX512BF16__)
            for (int r = 0; r < R; r++) {
                const __m512i inputs = _mm512_set1_epi32(word(&in.halves[size_t(b + r) * in.widest + column]));
                sum[j][r] = (Floats)_mm512_dpbf16_ps((__m512)sum[j][r], (__m512bh)pair, (__m512bh)inputs);
            }
#else
            const Floats even = (Floats)(pair << 16), odd = (Floats)(pair & 0xFFFF0000);
            for (int r = 0; r < R; r++) {
                const float* x = in.x + size_t(b + r) * in.stride + column;
                sum[j][r] += even * x[0];
                sum[j][r] += odd * x[1];
            }
#endif
        }
    add_ways(sum, out);
}

template <int R> void product_int8(const Matrix& m, int panel, const Inputs& in, int b, Floats (&out)[R]) {
    const uint8_t* w = (const uint8_t*)m.weight + size_t(panel) * m.columns * LANES;
    for (int r = 0; r < R; r++) out[r] = Floats{};
    for (int g = 0; g < m.columns / GROUP; g++, w += GROUP * LANES) {
#if defined(__AVX512VNNI__)
        const int at = b * (in.widest / GROUP) + g;
        constexpr int APART = R < 8 ? 2 : 1;  // of whole numbers, which add up the same in any order
        Ints sum[APART][R] = {};
        for (int r = 0; r < R; r++) sum[0][r] -= 128 * in.sum[at + r * (in.widest / GROUP)];
        for (int k = 0; k < GROUP; k += 4 * APART)
            for (int j = 0; j < APART; j++) {
                const Ints weights = load<Ints>(w + (k + 4 * j) * LANES);
                for (int r = 0; r < R; r++) {
                    const int8_t* x = &in.bytes[size_t(b + r) * in.widest + g * GROUP + k + 4 * j];
                    sum[j][r] = add_dot4(sum[j][r], weights, word(x));
                }
            }
        for (int r = 0; r < R; r++) {
            for (int j = 1; j < APART; j++) sum[0][r] += sum[j][r];
            out[r] += as_float(sum[0][r]) * in.scale[at + r * (in.widest / GROUP)];
        }
#else
        const float* x = in.x + size_t(b) * in.stride + g * GROUP;
        for (int k = 0; k < GROUP; k += 4) {
            const Words four = load<Words>(w + k * LANES) ^ 0x80808080u;  // bytes with a sign
            for (int i = 0; i < 4; i++) {
                const Floats weights = as_float((Ints)(four << (24 - 8 * i)) >> 24);
                for (int r = 0; r < R; r++) out[r] += weights * x[size_t(r) * in.stride + k + i];
            }
        }
#endif
    }
    const Floats scale = wide((const float*)m.scale + panel * LANES);
    for (int r = 0; r < R; r++) out[r] *= scale;
}

template <int R> void product_int4(const Matrix& m, int panel, const Inputs& in, int b, Floats (&out)[R]) {
    const uint8_t* w = (const uint8_t*)m.weight + size_t(panel) * m.columns * LANES / 2;
    const bfloat16* scales = (const bfloat16*)m.scale + size_t(panel) * (m.columns / GROUP) * LANES;
    for (int r = 0; r < R; r++) out[r] = Floats{};
    for (int g = 0; g < m.columns / GROUP; g++, w += GROUP * LANES / 2, scales += LANES) {
        const Floats scale = wide(scales);
#if defined(__AVX512VNNI__)
        const int at = b * (in.widest / GROUP) + g;
        Ints sum[2][R] = {};
        for (int r = 0; r < R; r++) sum[0][r] -= 8 * in.sum[at + r * (in.widest / GROUP)];
        for (int k = 0; k < GROUP; k += 8) {
            const Words eight = load<Words>(w + k * LANES / 2);
            const Ints low = (Ints)(eight & 0x0F0F0F0Fu), high = (Ints)(eight & 0xF0F0F0F0u);  // high: 16 times too large
            for (int r = 0; r < R; r++) {
                const int8_t* x = &in.bytes[size_t(b + r) * in.widest + g * GROUP + k];
                sum[0][r] = add_dot4(sum[0][r], low, word(x));
                sum[1][r] = add_dot4(sum[1][r], high, word(x + 4));
            }
        }
        for (int r = 0; r < R; r++) out[r] += as_float(sum[0][r] + (sum[1][r] >> 4)) * (scale * in.scale[at + r * (in.widest / GROUP)]);
#else
        const float* x = in.x + size_t(b) * in.stride + g * GROUP;
        Floats sum[R] = {};
        for (int k = 0; k < GROUP; k += 8) {
            const Words eight = load<Words>(w + k * LANES / 2);
            for (int i = 0; i < 8; i++) {
                const Floats weights = as_float((Ints)(eight >> (i < 4 ? 8 * i : 8 * i - 28) & 15u) - 8);
                for (int r = 0; r < R; r++) sum[r] += weights * x[size_t(r) * in.stride + k + i];
            }
        }
        for (int r = 0; r < R; r++) out[r] += sum[r] * scale;
#endif
    }
}

template <int R> __attribute__((noinline)) int product(const Matrix& m, int panel, const Inputs& in, int b, Floats* to) {
    Floats out[R];
    switch (m.type) {
        case FLOAT32:
        case BFLOAT16:
            if constexpr (R <= MOST_FLOAT_ROWS) m.type == FLOAT32 ? product_float32<R>(m, panel, in, b, out) : product_bfloat16<R>(m, panel, in, b, out);
            break;
        case INT8: product_int8<R>(m, panel, in, b, out); break;
        default: product_int4<R>(m, panel, in, b, out);
    }
    for (int r = 0; r < R; r++) to[r] = m.bias ? out[r] + wide(m.bias + panel * LANES) : out[r];
    return R;
}

#include "tiles.h"

// The panels from begin to end times every input; take(b, row, results) takes LANES results from a row of the matrix on.
template <class Take>
void multiply(const Matrix& m, int begin, int end, const Inputs& in, int batch, Take&& take) {
    if (tiles::fit(m)) return tiles::multiply(m, begin, end, in, batch, take);
    for (int p = begin; p < end; p++)
        for (int b = 0; b < batch;) {  // the more rows at once, the fewer times the weights are read
            Floats out[MOST_ROWS];
            const int left = std::min(batch - b, m.type == FLOAT32 || m.type == BFLOAT16 ? MOST_FLOAT_ROWS : MOST_ROWS);
            const int done = left >= 8   ? product<8>(m, p, in, b, out)
                             : left >= 4 ? product<4>(m, p, in, b, out)
                             : left >= 2 ? product<2>(m, p, in, b, out)
                                         : product<1>(m, p, in, b, out);
            for (int r = 0; r < done; r++) take(b + r, p * LANES, out[r]);
            b += done;
        }
}

// --- Norm, rotation, attention

// x is padded with zeros, and so is what comes out: the norm's own weights are.
void normalize(const float* x, const Norm& norm, int n, float eps, bool rms, float* out) {
    Floats sum{}, square{};
    if (!rms)
        for (int i = 0; i < n; i += LANES) sum += wide(x + i);
    const float mean = total(sum) / n;
    for (int i = 0; i < n; i += LANES) {
        const Floats away = first(n - i, wide(x + i) - mean);
        square += away * away;
    }
    const float scale = 1.f / std::sqrt(total(square) / n + eps);
    for (int i = 0; i < n; i += LANES) {
        const Floats y = (wide(x + i) - mean) * scale * wide(norm.weight + i);
        store(out + i, norm.bias ? y + wide(norm.bias + i) : y);
    }
}

// The RMS norm of n numbers that others stand behind, in place.
void normalize_part(float* x, const float* weight, int n, float eps) {
    Floats square{};
    for (int i = 0; i < n; i += LANES) {
        const Floats y = wide_first(n - i, x + i);
        square += y * y;
    }
    const float scale = 1.f / std::sqrt(total(square) / n + eps);
    for (int i = 0; i < n; i += LANES) store_first(n - i, x + i, wide_first(n - i, x + i) * scale * wide(weight + i));
}

// Turn each pair (i, i + R/2) of every head's first R numbers by its angle.
void rotate(float* x, int heads, int head_dim, int dim, const float* cosines, const float* sines) {
    const int half = dim / 2;
    for (int h = 0; h < heads; h++, x += head_dim)
        for (int i = 0; i < half; i++) {
            const float a = x[i], b = x[i + half];
            x[i] = a * cosines[i] - b * sines[i];
            x[i + half] = b * cosines[i] + a * sines[i];
        }
}

// How well N positions' keys answer the query, whose padding is zero.
template <int N, class T> inline void answers(const float* query, const T* keys, int d, float* scores) {
    Floats sum[N] = {};
    int i = 0;
    for (; i + LANES <= d; i += LANES)
        for (int n = 0; n < N; n++) sum[n] += wide(query + i) * wide(keys + size_t(n) * d + i);
    if (i < d)
        for (int n = 0; n < N; n++) sum[n] += wide(query + i) * wide_first(d - i, keys + size_t(n) * d + i);
    if constexpr (N == 4) totals(sum, scores);
    else scores[0] = total(sum[0]);
}

// N registers' worth of the values [length, d] from dimension i on, weighted and added up.
template <int N, class T> inline void collect(const float* weights, const T* values, int length, int d, int i, float scale, float* out) {
    Floats sum[2][N] = {};
    int s = 0;
    for (; s + 2 <= length; s += 2)
        for (int j = 0; j < 2; j++)
            for (int n = 0; n < N; n++) sum[j][n] += weights[s + j] * wide(values + size_t(s + j) * d + i + n * LANES);
    for (; s < length; s++)
        for (int n = 0; n < N; n++) sum[0][n] += weights[s] * wide(values + size_t(s) * d + i + n * LANES);
    for (int n = 0; n < N; n++) store(out + i + n * LANES, (sum[0][n] + sum[1][n]) * scale);
}

// What one query [D], padded with zeros and already scaled, gathers from keys and values [length, D]. ``weights`` is
// room for length numbers, padded.
template <class T>
void attend(const float* query, const T* keys, const T* values, int length, int d, float* weights, float* out) {
    int s = 0;
    for (; s + 4 <= length; s += 4) answers<4>(query, keys + size_t(s) * d, d, weights + s);
    for (; s < length; s++) answers<1>(query, keys + size_t(s) * d, d, weights + s);
    for (; s % LANES; s++) weights[s] = -INFINITY;
    Floats most = same(-INFINITY), sum{};
    for (s = 0; s < length; s += LANES) most = larger(most, wide(weights + s));
    const float peak = largest(most);
    for (s = 0; s < length; s += LANES) {
        const Floats w = first(length - s, exponential(wide(weights + s) - peak));
        store(weights + s, w);
        sum += w;
    }
    const float scale = 1.f / total(sum);
    int i = 0;
    for (; i + 4 * LANES <= d; i += 4 * LANES) collect<4>(weights, values, length, d, i, scale, out);
    for (; i + LANES <= d; i += LANES) collect<1>(weights, values, length, d, i, scale, out);
    if (i < d) {
        Floats last{};
        for (s = 0; s < length; s++) last += weights[s] * wide_first(d - i, values + size_t(s) * d + i);
        store_first(d - i, out + i, last * scale);
    }
}

// --- Threads

inline void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Threads that walk through the same phases of work. A phase is cut into pieces; whoever is free takes the next one, and
// the phase is over when all are done, no matter by whom. So a slow core does fewer, and a thread that the system has
// put aside (another process wants its core) holds nobody up, unless in the middle of a piece. Idle threads sleep.
class Crew {
public:
    explicit Crew(int count) : count_(count) {
        for (int i = 1; i < count; i++) try {
                threads_.emplace_back([this, i] { serve(i); });
            } catch (const std::system_error&) {  // no more to be had: the others do the work
                break;
            }
    }
    ~Crew() {
        stop_ = true;
        call();
        for (auto& thread : threads_) thread.join();
    }
    int count() const { return count_; }
    uint64_t next_phase() const { return next_.load(std::memory_order_relaxed) >> 32; }

    // job(i) on every thread, on the caller's as i = 0, whose end it waits for. The phases in it are then over; others may
    // still walk through it, and find nothing left to do.
    void run(const std::function<void(int)>& job) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            job_ = job;
        }
        call();
        job(0);
    }

    // In a job: work(begin, end) for pieces of 0 to items, on this thread as long as there are any, until all are done.
    // Phases are numbered without a gap from next_phase() on, the same by every thread.
    template <class Work> void phase(uint64_t number, int items, Work&& work) {
        if (count_ == 1) return work(0, items);
        const int64_t pieces = std::min(items, PIECES * count_);
        for (;;) {
            uint64_t next = next_.load(std::memory_order_acquire);
            if (next >> 32 != number) return;
            const int64_t piece = int64_t(next & 0xFFFFFFFF);
            if (piece == pieces) return wait_for_end(number);
            if (!next_.compare_exchange_weak(next, next + 1, std::memory_order_acq_rel)) continue;
            work(int(items * piece / pieces), int(items * (piece + 1) / pieces));
            if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == pieces) {
                done_.store(0, std::memory_order_relaxed);
                next_.store((number + 1) << 32, std::memory_order_release);
            }
        }
    }

private:
    static constexpr int PIECES = 4;  // for each thread

    void call() {
        calls_.fetch_add(1, std::memory_order_release);
        calls_.notify_all();
    }
    void serve(int index) {
        for (uint32_t seen = 0;;) {
            for (int spins = 0; spins < 1000 && calls_.load(std::memory_order_acquire) == seen; spins++) pause();
            calls_.wait(seen, std::memory_order_acquire);
            seen = calls_.load(std::memory_order_acquire);
            if (stop_) return;
            std::function<void(int)> job;
            {
                std::lock_guard<std::mutex> lock(mutex_);
                job = job_;
            }
            job(index);
        }
    }
    // Spinning, for the end takes less than a wake-up; but not for long where another process has the core that it is to
    // come from.
    void wait_for_end(uint64_t number) {
        for (int spins = 0; next_.load(std::memory_order_acquire) >> 32 == number; spins++)
            if (spins < 1000) pause();
            else std::this_thread::yield();
    }

    const int count_;
    std::vector<std::thread> threads_;
    std::mutex mutex_;  // of job_
    std::function<void(int)> job_;
    std::atomic<bool> stop_{false};
    alignas(64) std::atomic<uint32_t> calls_{0};
    alignas(64) std::atomic<uint64_t> next_{0};  // number of the phase, and below it the next piece
    alignas(64) std::atomic<int64_t> done_{0};   // pieces
};

// --- The step

// A table of vectors [B, n], each padded with zeros to whole groups.
struct Rows {
    int stride = 0;
    std::vector<float> numbers;
    void room(int batch, int n) {
        stride = up(n, GROUP);
        numbers.assign(size_t(batch) * stride, 0.f);
    }
    float* operator[](int b) { return numbers.data() + size_t(b) * stride; }
};

class Step {
public:
    explicit Step(const Model& model)
        : m(model), own(m.threads), scores(m.threads), scaled(m.threads), crew(m.threads) {
        for (auto& each : scaled) each.assign(up(m.head_dim, GROUP), 0.f);
    }

    // More tokens in each of ``count`` rows: tokens[r] of them in row r, whose cache holds lengths[r]. Each sees what
    // stands before it. ids: [B], row after row; keys and values: for each layer [count, K, capacity, D]; logits: [B, V].
    // With ``last`` only those behind each row's last token: [count, V].
    // Below, a token is what a row of a batch is elsewhere: B is all of them.
    void run(int count, const int64_t* tokens, const int64_t* ids, const int64_t* lengths, int cache_type,
             void* const* keys, void* const* values, int64_t capacity, bool last, float* logits) {
        first_of.assign(1, 0);
        int64_t longest = 0;
        for (int r = 0; r < count; r++) {
            first_of.push_back(first_of[r] + int(tokens[r]));
            longest = std::max(longest, lengths[r] + tokens[r]);
        }
        const int batch = first_of[count];
        room(batch, int(longest));
        for (int r = 0; r < count; r++)
            for (int b = first_of[r]; b < first_of[r + 1]; b++) begin(b, ids[b], lengths[r] + b - first_of[r]);
        uint64_t phase = crew.next_phase();
        crew.run([=, this](int t) mutable {
            const tiles::Use use;
            // A thread makes its own inputs of a matrix ready, once it has a piece: cheaper than to wait for another's.
            const auto multiplying = [&](int panels, auto&& prepare, auto&& work) {
                bool ready = false;
                crew.phase(phase++, panels, [&](int begin, int end) {
                    if (!ready) prepare();
                    ready = true;
                    work(begin, end);
                });
            };
            // What a matrix makes of its inputs goes to the stream, perhaps normed, for which all of it has to be there.
            const auto add_to_stream = [&](const Matrix& matrix, const Norm& norm, Rows& inputs) {
                Rows& to = m.norm_output ? made : stream;
                multiplying(
                    panels(matrix), [&] { own[t].take(inputs[0], inputs.stride, batch, matrix); },
                    [&](int begin, int end) {
                        multiply(matrix, begin, end, own[t], batch, [&](int b, int i, Floats y) {
                            store(to[b] + i, m.norm_output ? y : wide(to[b] + i) + y);
                        });
                    });
                if (m.norm_output)
                    crew.phase(phase++, batch, [&](int begin, int end) {
                        for (int b = begin; b < end; b++) {
                            normalize(made[b], norm, m.width, m.eps, m.rms, made[b]);
                            for (int i = 0; i < m.width; i += LANES) store(stream[b] + i, wide(stream[b] + i) + wide(made[b] + i));
                        }
                    });
            };
            for (int l = 0; l < m.layers; l++) {
                const Layer& layer = m.blocks[l];
                const auto neurons = [&] {
                    multiplying(
                        panels(layer.up), [&] { read(t, batch, layer.mlp_norm, layer.up); },
                        [&](int begin, int end) { hidden_neurons(t, batch, layer, begin, end); });
                };
                multiplying(
                    panels(layer.query) + 2 * panels(layer.key), [&] { read(t, batch, layer.attention_norm, layer.query); },
                    [&](int begin, int end) { queries_keys_values(t, batch, layer, begin, end); });
                if (m.qk_norm == 2)
                    crew.phase(phase++, batch, [&](int begin, int end) {
                        for (int b = begin; b < end; b++) {
                            normalize_part(query[b], layer.query_norm.weight, m.heads * m.head_dim, m.eps);
                            normalize_part(key[b], layer.key_norm.weight, m.kv_heads * m.head_dim, m.eps);
                        }
                    });
                crew.phase(phase++, count * m.kv_heads, [&](int begin, int end) {
                    for (int head = begin; head < end; head++) {
                        const int r = head / m.kv_heads;
                        const int64_t at = head * capacity * m.head_dim;
                        // All tokens of a row, in order: who comes later sees the keys of those before.
                        for (int b = first_of[r]; b < first_of[r + 1]; b++) {
                            const int64_t length = lengths[r] + b - first_of[r];
                            if (cache_type == FLOAT32) attention<float>(t, b, head % m.kv_heads, layer, length, keys[l], values[l], at);
                            else attention<bfloat16>(t, b, head % m.kv_heads, layer, length, keys[l], values[l], at);
                        }
                    }
                });
                if (m.parallel) neurons();  // which read the stream as it came in
                add_to_stream(layer.output, layer.attention_norm, gathered);
                if (!m.parallel) neurons();
                add_to_stream(layer.down, layer.mlp_norm, hidden);
            }
            const int asked = last ? count : batch;
            multiplying(
                panels(m.unembedding),
                [&] { normed(t, asked, m.norm, m.unembedding, [&](int b) { return last ? first_of[b + 1] - 1 : b; }); },
                [&](int begin, int end) {
                    multiply(m.unembedding, begin, end, own[t], asked, [&](int b, int i, Floats y) {
                        store_first(m.vocab - i, logits + size_t(b) * m.vocab + i, y);
                    });
                });
        });
    }

private:
    static int panels(const Matrix& a) { return a.rows / LANES; }

    void room(int batch, int longest) {
        for (auto& each : scores)
            if (int(each.size()) < up(longest, LANES)) each.resize(2 * up(longest, LANES));
        if (batch <= rows) return;
        rows = 0;  // until all is there: the memory may not suffice
        stream.room(batch, m.width);
        if (m.norm_output) made.room(batch, m.width);
        query.room(batch, m.heads * m.head_dim);
        key.room(batch, m.kv_heads * m.head_dim);
        value.room(batch, m.kv_heads * m.head_dim);
        gathered.room(batch, m.heads * m.head_dim);
        hidden.room(batch, m.mlp_width);
        cosines.room(batch, m.rope_dim / 2);
        sines.room(batch, m.rope_dim / 2);
        for (auto& inputs : own) inputs.room(batch, std::max({stream.stride, gathered.stride, hidden.stride}));
        rows = batch;
    }

    // The embedding of a token, with its position.
    void begin(int b, int64_t id, int64_t position) {
        for (int i = 0; i < m.width; i += LANES) {
            Floats x = from_table(m.embedding, id, i);
            if (m.positions) x += from_table(m.positions, position, i);
            store(stream[b] + i, x);
        }
        if (m.frequencies)
            for (int i = 0; i < m.rope_dim / 2; i++) {
                const float angle = float(position) * m.frequencies[i] * slowed(position, i);
                cosines[b][i] = std::cos(angle) * m.rope_size;
                sines[b][i] = std::sin(angle) * m.rope_size;
            }
    }
    // By what a pair turns less far in a text up to this position ("dynamic" in core/rope.py): its base is larger.
    float slowed(int64_t position, int i) const {
        if (!m.original_context || position < m.original_context) return 1.f;
        const float growth = m.rope_factor * float(position + 1) / float(m.original_context) - (m.rope_factor - 1.f);
        return std::pow(growth, -2.f * float(i) / float(m.rope_dim - 2));
    }
    Floats from_table(const void* table, int64_t row, int i) const {
        const size_t at = size_t(row) * m.width + i;
        if (m.table_type == FLOAT32) return wide_first(m.width - i, (const float*)table + at);
        return wide_first(m.width - i, (const bfloat16*)table + at);
    }

    // Every row's stream as a matrix wants it.
    void read(int t, int batch, const Norm& norm, const Matrix& next) {
        if (m.norm_output) own[t].take(stream[0], stream.stride, batch, next);
        else normed(t, batch, norm, next, [](int b) { return b; });
    }

    // The norm of every row's stream (of row(b), for each b), for a thread of its own: cheaper than to wait for another's.
    template <class Row> void normed(int t, int batch, const Norm& norm, const Matrix& next, Row&& row) {
        Inputs& in = own[t];
        for (int b = 0; b < batch; b++)
            normalize(stream[row(b)], norm, m.width, m.eps, m.rms, &in.normed[size_t(b) * in.widest]);
        in.take(in.normed.data(), in.widest, batch, next);
    }

    // Some of the panels of the three matrices, counted as if they stood below each other.
    void queries_keys_values(int t, int batch, const Layer& layer, int begin, int end) {
        const std::pair<const Matrix*, Rows*> three[] = {{&layer.query, &query}, {&layer.key, &key}, {&layer.value, &value}};
        for (auto [matrix, to] : three) {
            multiply(*matrix, std::max(begin, 0), std::min(end, panels(*matrix)), own[t], batch,
                     [rows = to](int b, int i, Floats y) { store((*rows)[b] + i, y); });
            begin -= panels(*matrix);
            end -= panels(*matrix);
        }
    }

    // The up-projection and the activation; with a gate beside it, it is the gate that is activated.
    void hidden_neurons(int t, int batch, const Layer& layer, int begin, int end) {
        const Matrix& first = layer.gate.weight ? layer.gate : layer.up;
        multiply(first, begin, end, own[t], batch,
                 [&](int b, int i, Floats y) { store(hidden[b] + i, activate(y, m.activation)); });
        if (layer.gate.weight)
            multiply(layer.up, begin, end, own[t], batch,
                     [&](int b, int i, Floats y) { store(hidden[b] + i, wide(hidden[b] + i) * y); });
    }

    // All that is to be done for key-value head k of token b, by one thread: its key and value go to the cache, and the
    // H/K queries that share it gather.
    template <class T>
    void attention(int t, int b, int k, const Layer& layer, int64_t length, void* all_keys, void* all_values, int64_t at) {
        const int d = m.head_dim, shared = m.heads / m.kv_heads;
        T* keys = (T*)all_keys + at;
        T* values = (T*)all_values + at;
        float* k_new = key[b] + k * d;
        float* queries = query[b] + k * shared * d;
        if (m.qk_norm == 1) {
            normalize_part(k_new, layer.key_norm.weight, d, m.eps);
            for (int h = 0; h < shared; h++) normalize_part(queries + h * d, layer.query_norm.weight, d, m.eps);
        }
        if (m.frequencies && layer.rotated) {
            rotate(k_new, 1, d, m.rope_dim, cosines[b], sines[b]);
            rotate(queries, shared, d, m.rope_dim, cosines[b], sines[b]);
        }
        for (int i = 0; i < d; i++) {
            narrow(k_new[i], keys + size_t(length) * d + i);
            narrow(value[b][k * d + i], values + size_t(length) * d + i);
        }
        const float scale = 1.f / std::sqrt(float(d));
        const int64_t seen = layer.window ? std::min<int64_t>(length + 1, layer.window) : length + 1;
        keys += size_t(length + 1 - seen) * d;
        values += size_t(length + 1 - seen) * d;
        for (int h = 0; h < shared; h++) {
            for (int i = 0; i < d; i++) scaled[t][i] = queries[h * d + i] * scale;
            attend(scaled[t].data(), keys, values, int(seen), d, scores[t].data(), gathered[b] + (k * shared + h) * d);
        }
    }

    const Model m;
    int rows = 0;  // there is room for
    std::vector<int> first_of;                                         // each row's tokens, and the end
    Rows stream, made, query, key, value, gathered, hidden, cosines, sines;  // shared by the threads
    std::vector<Inputs> own;                                           // for each thread: what it multiplies,
    std::vector<std::vector<float>> scores, scaled;                    // its attention and its query
    Crew crew;                                                         // last: it ends before what it works on
};

#include "draw.h"

}  // namespace

#ifndef GPTCLI_BUILT
#define GPTCLI_BUILT ""
#endif

// What this file was built from and for; core/native_build.py compares it before anything else is called.
GPTCLI_API const char* gptcli_built() { return GPTCLI_BUILT; }
GPTCLI_API int32_t gptcli_abi() { return ABI; }
GPTCLI_API int32_t gptcli_lanes() { return LANES; }
#if defined(__AVX512F__)
#define REGISTERS "AVX-512"
#elif defined(__AVX2__)
#define REGISTERS "AVX2"
#else
#define REGISTERS "128-bit vectors"
#endif
#if defined(__AVX512VNNI__)
#define BYTES ", VNNI"
#else
#define BYTES ""
#endif
#if defined(__AVX512BF16__)
#define HALVES ", BF16"
#else
#define HALVES ""
#endif
GPTCLI_API const char* gptcli_features() {  // that it uses
    return tiles::allowed() ? REGISTERS BYTES HALVES ", AMX" : REGISTERS BYTES HALVES;
}

// Null where there is not enough memory. The model's arrays are not copied, and have to stay.
GPTCLI_API void* gptcli_open(const Model* model) {
    try {
        return new Step(*model);
    } catch (const std::bad_alloc&) {
        return nullptr;
    }
}

GPTCLI_API void gptcli_close(void* step) { delete static_cast<Step*>(step); }

// See Step::run. Ids and lengths are checked by the caller. False where there is not enough memory.
GPTCLI_API bool gptcli_step(void* step, int32_t count, const int64_t* tokens, const int64_t* ids, const int64_t* lengths,
                            int32_t cache_type, void* const* keys, void* const* values, int64_t capacity, bool last,
                            float* logits) {
    try {
        static_cast<Step*>(step)->run(count, tokens, ids, lengths, cache_type, keys, values, capacity, last, logits);
        return true;
    } catch (const std::bad_alloc&) {
        return false;
    }
}

// A matrix times x [B, columns], into y [B, rows], on this thread alone: for tests and benchmarks.
GPTCLI_API void gptcli_multiply(const Matrix* m, int32_t batch, const float* x, float* y) {
    const tiles::Use use;
    Inputs in;
    in.room(batch, m->columns);
    in.take(x, m->columns, batch, *m);
    multiply(*m, 0, m->rows / LANES, in, batch, [&](int b, int i, Floats out) { store(y + size_t(b) * m->rows + i, out); });
}

// A token for each of the rows [batch, vocab], ``stride`` numbers apart, or -1 where the caller has to decide: by the
// rules of a chain, or without one the likeliest. Returns how many it gave.
GPTCLI_API int32_t gptcli_draw(int32_t batch, int32_t vocab, int64_t stride, const float* logits, const draw::Chain* chain,
                               const uint64_t* seeds, const int64_t* positions, int64_t* tokens) {
    thread_local draw::Row row;
    int32_t given = 0;
    for (int32_t b = 0; b < batch; b++) try {
            tokens[b] = draw::UNDECIDED;
            if (!chain) tokens[b] = draw::likeliest(logits + b * stride, vocab);
            else if (row.take(logits + b * stride, vocab, chain->temperature))
                tokens[b] = draw::sampled(row, *chain, {seeds[b], positions[b]});
            given += tokens[b] != draw::UNDECIDED;
        } catch (const std::bad_alloc&) {
        }
    return given;
}
