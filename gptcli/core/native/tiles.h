// Products of bfloat16 by tiles, where the CPU has them (AMX): one instruction multiplies up to 16 rows of inputs with 16
// rows of a matrix, a panel's 32 columns at a time. One row is as fast as without them, and up to 16 hardly cost more.
//
// A tile is 16 lines of 64 bytes, and a panel is stored in just that way (see Matrix). What an input gives is added up in
// the same order whatever stands in the other lines, so it is the same in any company.
//
// A part of step.cpp, whose vectors it uses.

namespace tiles {

constexpr int ROWS = 16;    // of inputs in a tile, at most
constexpr int PANELS = 4;   // at once, since a sum has to wait for the product before
constexpr int COLUMNS = 32; // of inputs in a tile
static_assert(GROUP % COLUMNS == 0, "matrices and inputs are padded to whole tiles");

#if defined(GPTCLI_TILES)

// Whether the system lets this process use them, which it has to be asked for.
inline bool allowed() {
    static const bool yes = syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* XFEATURE_XTILEDATA */) == 0;
    return yes;
}

inline bool fit(const Matrix& m) { return m.type == BFLOAT16 && allowed(); }

// What a thread's tiles look like, as the CPU has it.
struct alignas(64) Shape {
    uint8_t palette, start_row, unused[14];
    uint16_t bytes[16];
    uint8_t rows[16];
};

// Lets the thread that makes it use tiles as long as it lives, and leaves them as they were: others use them as well.
class Use {
public:
    Use() {
        if (allowed()) _tile_storeconfig(&before_);
        rows() = 0;
    }
    ~Use() {
        if (!rows()) return;
        if (before_.palette) _tile_loadconfig(&before_);
        else _tile_release();
    }
    Use(const Use&) = delete;

    // Tiles 0 to 3 are sums and 4 is inputs, of so many rows; 5 and 6 are panels.
    static void shape(int count) {
        if (count == rows()) return;
        Shape shape{};
        shape.palette = 1;
        for (int i = 0; i < 7; i++) {
            shape.bytes[i] = 64;
            shape.rows[i] = uint8_t(i < 5 ? count : ROWS);
        }
        asm volatile("" : : "m"(shape));  // all of it is written before; compilers know of its first bytes only
        _tile_loadconfig(&shape);
        rows() = count;
    }

private:
    static int& rows() {
        thread_local int now = 0;  // what this thread's tiles are shaped for; 0: not by us
        return now;
    }
    Shape before_{};
};

// P panels of a matrix times as many rows of the inputs as tiles are shaped for: out[p][r] for row r of panel p.
template <int P> inline void product(const Matrix& m, int panel, const bfloat16* x, int stride, float (&out)[PANELS][ROWS][LANES]) {
    const size_t size = size_t(m.columns) * LANES;  // of a panel
    const bfloat16* w = (const bfloat16*)m.weight + panel * size;
    _tile_zero(0);
    if constexpr (P > 1) _tile_zero(1);
    if constexpr (P > 2) _tile_zero(2);
    if constexpr (P > 3) _tile_zero(3);
    for (int k = 0; k < m.columns; k += COLUMNS, x += COLUMNS, w += COLUMNS * LANES) {
        _tile_loadd(4, x, stride * sizeof *x);
        _tile_loadd(5, w, 64);
        _tile_dpbf16ps(0, 4, 5);
        if constexpr (P > 1) {
            _tile_loadd(6, w + size, 64);
            _tile_dpbf16ps(1, 4, 6);
        }
        if constexpr (P > 2) {
            _tile_loadd(5, w + 2 * size, 64);
            _tile_dpbf16ps(2, 4, 5);
        }
        if constexpr (P > 3) {
            _tile_loadd(6, w + 3 * size, 64);
            _tile_dpbf16ps(3, 4, 6);
        }
    }
    _tile_stored(0, out[0], 64);
    if constexpr (P > 1) _tile_stored(1, out[1], 64);
    if constexpr (P > 2) _tile_stored(2, out[2], 64);
    if constexpr (P > 3) _tile_stored(3, out[3], 64);
}

// As ``multiply`` in step.cpp.
template <class Take> void multiply(const Matrix& m, int begin, int end, const Inputs& in, int batch, Take&& take) {
    alignas(64) float out[PANELS][ROWS][LANES];
    const int whole = batch / ROWS * ROWS;
    const auto some = [&](int first, int last, int rows) {
        if (first == last) return;
        Use::shape(rows);
        for (int p = begin; p < end; p += PANELS)
            for (int b = first; b < last; b += rows) {
                const bfloat16* x = &in.halves[size_t(b) * in.widest];
                const int count = std::min(PANELS, end - p);
                switch (count) {
                    case 1: product<1>(m, p, x, in.widest, out); break;
                    case 2: product<2>(m, p, x, in.widest, out); break;
                    case 3: product<3>(m, p, x, in.widest, out); break;
                    default: product<4>(m, p, x, in.widest, out);
                }
                for (int i = 0; i < count; i++)
                    for (int r = 0; r < rows; r++) {
                        const Floats y = wide(out[i][r]);
                        take(b + r, (p + i) * LANES, m.bias ? y + wide(m.bias + (p + i) * LANES) : y);
                    }
            }
    };
    some(0, whole, ROWS);
    some(whole, batch, batch - whole);
}

#else

inline bool allowed() { return false; }
inline bool fit(const Matrix&) { return false; }
struct Use {
    Use() {}
};
template <class Take> void multiply(const Matrix&, int, int, const Inputs&, int, Take&&) {}

#endif

}  // namespace tiles
