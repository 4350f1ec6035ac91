// From a row of logits to a token: the fast twin of ``sample`` in core/sampling.py, whose token it gives, or none.
//
// The token is the one of the highest score, its logit / T plus its noise. The noise is two logarithms of a hash, and
// hardly any of them is needed: from the hash alone follows a bound, and most tokens stay below the best so far even by
// that. What is left is scored in float64. The twin's scores are rounded to float32, so a second within a margin that
// covers its rounding makes a draw too close to call; then no token is given, and the twin has to decide.
//
// Filters are looked at where they matter. Nothing is sorted: of a drawn token it is enough to know how likely all those
// before it are together. Is it beyond top-p, then so is everything behind it, and among the others the draw is
// repeated, with the same noise.
//
// A part of step.cpp, whose vectors it uses.

namespace draw {

constexpr int64_t UNDECIDED = -1;
constexpr float MOST_NOISE = 22.9f;  // of any hash: -log of 2^-33

// By how much two scores near this one have to differ to differ in float32 as well: some times what the logarithms, the
// noise (up to MOST_NOISE) and the sum are rounded by.
inline double margin(double score) { return 1e-4 + 2e-6 * std::fabs(score); }

inline bool any(Ints mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#elif defined(__AVX2__)
    return _mm256_movemask_ps((__m256)mask);
#else
    int64_t parts[LANES / 2];
    store(parts, mask);
    return parts[0] | parts[1];
#endif
}

// MurmurHash3's finalizer, of one word and of a vector of them.
template <class W> inline W mix(W x) {
    x = (x ^ (x >> 16)) * 0x85EBCA6Bu;
    x = (x ^ (x >> 13)) * 0xC2B2AE35u;
    return x ^ (x >> 16);
}

// The noise of one draw: noise_keys and gumbel_noise there.
struct Noise {
    uint32_t first, second;

    Noise(uint64_t seed, int64_t position) {
        const uint32_t low = mix(uint32_t(seed) ^ 0x243F6A88u), high = mix(uint32_t(seed >> 32) ^ low ^ 0x85A308D3u);
        first = mix(uint32_t(position) * 0x9E3779B1u + high);
        second = mix(uint32_t(position) * 0x85EBCA6Bu + low + first);
    }
    template <class W> W start(W token) const { return token * 0x9E3779B1u + first; }
    template <class W> W hash(W start) const { return mix(mix(start) ^ second); }

    double of(uint32_t token) const {
        const float uniform = std::min((float(hash(start(token))) + 0.5f) * 0x1p-32f, 1 - 0x1p-24f);
        return -std::log(-std::log1p(-double(uniform)));
    }
    // Never less than ``of``: -log(-log(1 - U)) is at most -log(U), and a logarithm at least the line that a float's bits
    // draw between two powers of two.
    Floats bound(Words start) const {
        const Ints bits = (Ints)__builtin_convertvector(hash(start), Floats);
        constexpr float LN_2 = 0.6931472f;
        return (159 * LN_2 + 1e-4f) - as_float(bits) * (LN_2 * 0x1p-23f);  // 159: the exponent's 127, and 32 for U
    }
};

// A row of logits / T, padded with -inf.
struct Row {
    std::vector<float> x;
    int size = 0;
    float most = 0;  // the largest,
    int first = 0;   // and the first place where it stands

    // False where there is NaN, or nothing finite is the largest.
    bool take(const float* logits, int n, float temperature) {
        size = n;
        x.resize(up(n, LANES));
        Floats highest = same(-INFINITY);
        Ints bad{};
        for (int i = 0; i < n; i += LANES) {
            Floats v = same(-INFINITY);
            if (n - i >= LANES) v = wide(logits + i);
            else std::memcpy(&v, logits + i, size_t(n - i) * 4);
            v /= temperature;
            store(x.data() + i, v);
            bad |= v != v;
            highest = larger(highest, v);
        }
        most = largest(highest);
        if (any(bad) || !std::isfinite(most)) return false;
        for (first = 0; !any(wide(&x[first]) == most);) first += LANES;
        while (x[first] != most) first++;
        return true;
    }

    // The k-th largest, equal ones counted one by one.
    float largest_but(int k) {
        some_.clear();
        float least = -INFINITY;  // k are known to be as large
        const size_t room = size_t(k) + std::max(k, 32);
        for (int i = 0; i < size; i += LANES) {
            if (!any(wide(&x[i]) > least)) continue;
            for (int j = i; j < i + LANES; j++)
                if (x[j] > least) some_.push_back(x[j]);
            if (some_.size() >= room) least = shortened(k);
        }
        return some_.size() < size_t(k) ? least : shortened(k);
    }

private:
    float shortened(int k) {
        std::nth_element(some_.begin(), some_.begin() + (k - 1), some_.end(), std::greater<float>());
        some_.resize(k);
        return some_[k - 1];
    }
    std::vector<float> some_;
};

// Tokens in the order of their logits, equal ones in the order of their ids: those before this place.
struct Border {
    float least;
    int id;
    Ints before(Floats x, Ints ids) const { return (x > least) | ((x == least) & (ids < id)); }
};

// What a score has to exceed to be near the highest, with some room for a float32 bound's own rounding.
inline float floor_under(double highest) { return float(highest - 2 * margin(highest)); }

// The token before the border with the highest score. The likeliest token is always one of them.
inline int64_t best(const Row& row, const Noise& noise, Border border) {
    int64_t winner = row.first;
    double highest = row.most + noise.of(uint32_t(winner)), second = -INFINITY;
    float floor = floor_under(highest);
    Words start = noise.start((Words)lanes());
    for (int i = 0; i < row.size; i += LANES, start += LANES * 0x9E3779B1u) {
        const Floats x = wide(&row.x[i]);
        Ints left = x >= std::max(border.least, floor - MOST_NOISE);
        if (!any(left)) continue;
        left &= x + noise.bound(start) > floor;
        if (!any(left)) continue;
        for (int j = 0; j < LANES; j++) {
            if (!left[j] || i + j == row.first || (x[j] == border.least && i + j >= border.id)) continue;
            const double score = row.x[i + j] + noise.of(uint32_t(i + j));
            if (score > highest) {
                second = highest;
                highest = score;
                winner = i + j;
                floor = floor_under(highest);
            } else {
                second = std::max(second, score);
            }
        }
    }
    return highest - second > margin(highest) ? winner : UNDECIDED;
}

// How likely all tokens before the border are together, where the likeliest has 1.
inline double mass(const Row& row, Border border) {
    double sum = 0;
    for (int i = 0; i < row.size;) {
        Floats some{};  // so few that float32 holds their sum well
        for (const int end = std::min(row.size, i + 64 * LANES); i < end; i += LANES) {
            const Floats x = wide(&row.x[i]);
            some += border.before(x, lanes() + i) ? exponential(x - row.most) : Floats{};
        }
        sum += total(some);
    }
    return sum;
}

// The rules of a draw, as in core/settings.py; temperature: not 0; min_p: its logarithm, -inf for none.
struct Chain {
    float temperature, min_p;
    double top_p;
    int32_t top_k;
};

inline int64_t sampled(Row& row, const Chain& chain, const Noise& noise) {
    const float kth = chain.top_k > 0 && chain.top_k < row.size ? row.largest_but(chain.top_k) : -INFINITY;
    Border border{std::max(kth, row.most + chain.min_p), row.size};
    double all = 0;
    for (;;) {
        const int64_t token = best(row, noise, border);
        if (token == UNDECIDED || token == row.first || chain.top_p >= 1) return token;
        if (all == 0) all = mass(row, {kth, row.size});
        const Border behind{row.x[token], int(token)};
        const double before = mass(row, behind) / all;
        // The twin adds up float32 numbers, some in each lane of its registers.
        const double doubt = 1e-5 + row.size * 0x1p-26;
        if (before < chain.top_p - doubt) return token;
        if (before < chain.top_p + doubt) return UNDECIDED;
        border = behind;
    }
}

// The first of the largest.
inline int64_t likeliest(const float* logits, int n) {
    Floats highest = same(-INFINITY);
    Ints bad{};
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        const Floats x = wide(logits + i);
        bad |= x != x;
        highest = larger(highest, x);
    }
    float most = largest(highest);
    bool wrong = any(bad);
    for (; i < n; i++) {
        wrong |= logits[i] != logits[i];
        most = std::max(most, logits[i]);
    }
    if (wrong) return UNDECIDED;
    for (i = 0; i + LANES <= n && !any(wide(logits + i) == most);) i += LANES;
    while (i < n && logits[i] != most) i++;
    return i < n ? i : UNDECIDED;
}

}  // namespace draw
