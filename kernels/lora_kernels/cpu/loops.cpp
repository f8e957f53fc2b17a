// What a CPU does between matrix products, each a single pass over rows that torch would make several of.
//
// Compiled where it runs, once for each dtype (`build.py`), and called with addresses of tensors by `loops.py`, which
// says what each of them computes. The arithmetic is float32. Threads share the rows out whole, so that their number
// changes nothing. Numbers of a row lie side by side; a stride counts numbers from one row to the next. A scale is above
// 0: softmax begins with the difference from the largest, which is exact where it is 0, and is scaled then.

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace {

// Below so many numbers one thread takes no longer than two do with waking the other (activation, 2 cores with AMX).
constexpr long SHARED = 1 << 14;

struct bfloat16 {
    std::uint16_t bits;
};

inline std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

inline float float_of(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

inline float wide(float x) { return x; }
inline float wide(bfloat16 x) { return float_of(std::uint32_t(x.bits) << 16); }

// The nearest bfloat16, of two as near the even one.
inline std::uint32_t nearest(float x) {
    std::uint32_t bits = bits_of(x);
    std::uint32_t even = bits + 0x7fffu + ((bits >> 16) & 1u);
    return x == x ? even : 0x7fc00000u;
}

inline void put(float& to, float x) { to = x; }
inline void put(bfloat16& to, float x) { to.bits = std::uint16_t(nearest(x) >> 16); }

inline float rounded_as(float, float x) { return x; }
inline float rounded_as(bfloat16, float x) { return float_of(nearest(x) & 0xffff0000u); }

using Number = NUMBER;

inline float rounded(float x) { return rounded_as(Number{}, x); }

// e to the x, to two units in the last place: 2^n e^r with n whole and |r| at most ln(2) / 2. Once 1.5 * 2^23 is added,
// n stands in the lowest bits of a float. The series is Taylor's, with the coefficients of Cephes' expf (Moshier), which
// make the largest error smallest. What lies beyond +-88 is 0 or infinity.
inline float exponential(float x) {
    const float whole = 12582912.0f;
    float shifted = x * 1.44269504088896341f + whole;
    float n = shifted - whole;
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    float y = p * float_of((bits_of(shifted) - bits_of(whole) + 127u) << 23);
    y = x < -87.3f ? 0.0f : y;
    return x > 88.3f ? INFINITY : y;
}

// As many numbers as the widest registers hold of the smallest dtype.
constexpr long FULL = 32;

inline long filled(long numbers) { return (numbers + FULL - 1) / FULL * FULL; }

inline float sigmoid(float x) { return 1 / (1 + exponential(-x)); }

// Does something with each head of each part: told where it begins among all tokens and among the parts, and its rows.
template <class Work>
inline void each_part(int threads, long rows, long parts, long heads, long width, const long* ends, long head_stride,
                      long row_stride, Work work) {
#pragma omp parallel for collapse(2) num_threads(threads) if (parts * heads * rows * width > SHARED)
    for (long i = 0; i < parts; i++)
        for (long n = 0; n < heads; n++) {
            long begin = ends[2 * i], end = ends[2 * i + 1];
            work(n * head_stride + begin * row_stride, (i * heads + n) * rows * width, end - begin);
        }
}

}  // namespace

extern "C" {

void differentiate_logits(int threads, Number* logits, const std::int64_t* labels, float* nll, long rows, long words,
                          long stride, float scale, int need_gradient) {
#pragma omp parallel for num_threads(threads) if (rows * words > SHARED)
    for (long i = 0; i < rows; i++) {
        Number* z = logits + i * stride;
        float top = -INFINITY, sum = 0;
#pragma omp simd reduction(max : top)
        for (long j = 0; j < words; j++) top = wide(z[j]) > top ? wide(z[j]) : top;
#pragma omp simd reduction(+ : sum)
        for (long j = 0; j < words; j++) sum += exponential((wide(z[j]) - top) * scale);
        nll[i] = std::log(sum) + (top - wide(z[labels[i]])) * scale;
        if (!need_gradient) continue;
        float share = scale / sum;
#pragma omp simd
        for (long j = 0; j < words; j++) put(z[j], exponential((wide(z[j]) - top) * scale) * share);
        put(z[labels[i]], std::expm1(-nll[i]) * scale);
    }
}

void swiglu(int threads, Number* h, const Number* gate, const Number* up, long rows, long columns, long h_stride,
            long gate_stride, long up_stride) {
#pragma omp parallel for num_threads(threads) if (rows * columns > SHARED)
    for (long i = 0; i < rows; i++) {
        Number* h_row = h + i * h_stride;
        const Number *gate_row = gate + i * gate_stride, *up_row = up + i * up_stride;
#pragma omp simd
        for (long j = 0; j < columns; j++) {
            float x = wide(gate_row[j]);
            put(h_row[j], rounded(x * sigmoid(x)) * wide(up_row[j]));
        }
    }
}

void differentiate_swiglu(int threads, Number* dgate, Number* dup, Number* h, const Number* dh, const Number* gate,
                          const Number* up, long rows, long columns, long dh_stride, long gate_stride,
                          long up_stride) {
#pragma omp parallel for num_threads(threads) if (rows * columns > SHARED)
    for (long i = 0; i < rows; i++) {
        Number *dgate_row = dgate + i * columns, *dup_row = dup + i * columns, *h_row = h ? h + i * columns : nullptr;
        const Number *dh_row = dh + i * dh_stride, *gate_row = gate + i * gate_stride, *up_row = up + i * up_stride;
#pragma omp simd
        for (long j = 0; j < columns; j++) {
            float x = wide(gate_row[j]), y = wide(up_row[j]), d = wide(dh_row[j]);
            float share = sigmoid(x), silu = rounded(x * share);
            put(dup_row[j], d * silu);
            put(dgate_row[j], d * y * share * (1 + x * (1 - share)));
            if (h_row) put(h_row[j], silu * y);
        }
    }
}

void rms_norm(int threads, Number* y, Number* h, float* rstd, const Number* x, const Number* residual,
              const Number* weight, long rows, long columns, long y_stride, long x_stride, long residual_stride,
              float eps) {
#pragma omp parallel for num_threads(threads) if (rows * columns > SHARED)
    for (long i = 0; i < rows; i++) {
        const Number* normed = x + i * x_stride;
        if (residual) {
            const Number *x_row = normed, *residual_row = residual + i * residual_stride;
            Number* h_row = h + i * columns;
#pragma omp simd
            for (long j = 0; j < columns; j++) put(h_row[j], wide(x_row[j]) + wide(residual_row[j]));
            normed = h_row;
        }
        float squares = 0;
#pragma omp simd reduction(+ : squares)
        for (long j = 0; j < columns; j++) squares += wide(normed[j]) * wide(normed[j]);
        float r = 1 / std::sqrt(squares / columns + eps);
        rstd[i] = r;
        Number* y_row = y + i * y_stride;
#pragma omp simd
        for (long j = 0; j < columns; j++) put(y_row[j], rounded(wide(normed[j]) * r) * wide(weight[j]));
    }
}

void differentiate_rms_norm(int threads, Number* dx, const Number* dy, const Number* dh, const Number* h,
                            const float* rstd, const Number* weight, long rows, long columns, long dy_stride,
                            long dh_stride, long h_stride) {
#pragma omp parallel for num_threads(threads) if (rows * columns > SHARED)
    for (long i = 0; i < rows; i++) {
        const Number *dy_row = dy + i * dy_stride, *h_row = h + i * h_stride;
        Number* dx_row = dx + i * columns;
        float r = rstd[i], mean = 0;
#pragma omp simd reduction(+ : mean)
        for (long j = 0; j < columns; j++) mean += wide(dy_row[j]) * wide(weight[j]) * (wide(h_row[j]) * r);
        mean /= columns;
        if (dh) {
            const Number* dh_row = dh + i * dh_stride;
#pragma omp simd
            for (long j = 0; j < columns; j++)
                put(dx_row[j], (wide(dy_row[j]) * wide(weight[j]) - wide(h_row[j]) * r * mean) * r + wide(dh_row[j]));
        } else {
#pragma omp simd
            for (long j = 0; j < columns; j++)
                put(dx_row[j], (wide(dy_row[j]) * wide(weight[j]) - wide(h_row[j]) * r * mean) * r);
        }
    }
}

void rotate(int threads, Number* out, const Number* x, const float* cos, const float* sin, long batch, long heads,
            long tokens, long width, const long* out_strides, const long* x_strides, long angle_stride, int inverse) {
    long half = width / 2;
#pragma omp parallel for collapse(2) num_threads(threads) if (batch * heads * tokens * width > SHARED)
    for (long b = 0; b < batch; b++)
        for (long t = 0; t < tokens; t++) {
            const float *c = cos + b * angle_stride + t * width, *s = sin + b * angle_stride + t * width;
            // The gradient is multiplied by the transposed rotation: what went to one half comes back from there.
            const float *of_second = inverse ? s + half : s, *of_first = inverse ? s : s + half;
            float sign = inverse ? 1.0f : -1.0f;
            for (long n = 0; n < heads; n++) {
                Number* y = out + b * out_strides[0] + n * out_strides[1] + t * out_strides[2];
                const Number* z = x + b * x_strides[0] + n * x_strides[1] + t * x_strides[2];
#pragma omp simd
                for (long j = 0; j < half; j++) {
                    float first = wide(z[j]), second = wide(z[j + half]);
                    put(y[j], first * c[j] + sign * second * of_second[j]);
                    put(y[j + half], second * c[j + half] - sign * first * of_first[j]);
                }
            }
        }
}

void differentiate_scores(int threads, Number* scores, Number* dp, long rows, long queries, long keys, long window,
                          float scale) {
#pragma omp parallel num_threads(threads) if (rows * keys > SHARED)
    {
        // Rows of any length, filled up: what is left of one by whole registers would take as long as all the rest.
        long room = filled(keys);
        auto e = static_cast<float*>(std::aligned_alloc(64, 2 * room * sizeof(float))), g = e + room;
#pragma omp for
        for (long i = 0; i < rows; i++) {
            long end = keys - queries + i % queries + 1, begin = window && window < end ? end - window : 0;
            // Where registers go into a row whole, those at its ends are read and written whole too.
            long from = keys == room ? begin / FULL * FULL : begin, to = keys == room ? filled(end) : end;
            int first = int(begin - from), last = int(end - from), size = int(to - from), padded = int(filled(size));
            Number *s = scores + i * keys + from, *d = dp + i * keys + from;
#pragma omp simd
            for (int j = 0; j < size; j++) {
                bool seen = j >= first && j < last;
                e[j] = seen ? wide(s[j]) : -INFINITY;
                g[j] = seen ? wide(d[j]) : 0.0f;
            }
            for (int j = size; j < padded; j++) {
                e[j] = -INFINITY;
                g[j] = 0;
            }
            float top = -INFINITY, sum = 0, dot = 0;
#pragma omp simd reduction(max : top)
            for (int j = 0; j < padded; j++) top = e[j] > top ? e[j] : top;
#pragma omp simd reduction(+ : sum, dot)
            for (int j = 0; j < padded; j++) {
                e[j] = exponential((e[j] - top) * scale);
                sum += e[j];
                dot += e[j] * g[j];
            }
            float share = 1 / sum;
            dot *= share;
            for (Number* row : {s, d}) {
                std::memset(row - from, 0, from * sizeof(Number));
                std::memset(row + size, 0, (keys - to) * sizeof(Number));
            }
#pragma omp simd
            for (int j = 0; j < size; j++) {
                bool seen = j >= first && j < last;
                float p = e[j] * share;
                put(s[j], seen ? p : 0.0f);
                put(d[j], seen ? p * (g[j] - dot) * scale : 0.0f);
            }
        }
        std::free(e);
    }
}

void gather(int threads, Number* out, const Number* x, long rows, long parts, long heads, long width, const long* ends,
            long head_stride, long row_stride) {
    each_part(threads, rows, parts, heads, width, ends, head_stride, row_stride, [=](long in_x, long in_y, long size) {
        Number* to = out + in_y;
        for (long j = 0; j < size; j++)
            std::memcpy(to + j * width, x + in_x + j * row_stride, width * sizeof(Number));
        std::memset(to + size * width, 0, (rows - size) * width * sizeof(Number));
    });
}

void scatter(int threads, const Number* y, Number* x, long rows, long parts, long heads, long width, const long* ends,
             long head_stride, long row_stride) {
    each_part(threads, rows, parts, heads, width, ends, head_stride, row_stride, [=](long in_x, long in_y, long size) {
        for (long j = 0; j < size; j++)
            std::memcpy(x + in_x + j * row_stride, y + in_y + j * width, width * sizeof(Number));
    });
}

void scatter_add(int threads, const Number* y, float* x, long rows, long parts, long heads, long width,
                 const long* ends, long head_stride, long row_stride) {
    each_part(threads, rows, parts, heads, width, ends, head_stride, row_stride, [=](long in_x, long in_y, long size) {
        for (long j = 0; j < size; j++) {
            float* to = x + in_x + j * row_stride;
            const Number* from = y + in_y + j * width;
#pragma omp simd
            for (long m = 0; m < width; m++) to[m] += wide(from[m]);
        }
    });
}

}  // extern "C"
