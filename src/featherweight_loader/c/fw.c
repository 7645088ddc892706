/* Decodes .fw bundles (docs/fw-format.md): the head, tables, the range coder, pieces; LZMA1 and SHA-256 inside.
 *
 * Everything that a bundle says is taken as hostile: sizes are checked before they are added, multiplied or
 * allocated, bytes are read one by one, and what is handed over has the SHA-256 that the head declares.
 */
#include "fw.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include <zstd.h>

/* The tables are defined in IEEE doubles, each operation rounded to one. */
#if defined(__FAST_MATH__)
#error "fw.c: compile without -ffast-math, its tables are defined bit for bit"
#endif
#if DBL_MANT_DIG != 53 || FLT_EVAL_METHOD == 2 || FLT_EVAL_METHOD < 0
#error "fw.c: doubles are not IEEE's here; on 32-bit x86 compile with -msse2 -mfpmath=sse"
#endif

#define PREFIX 64u
#define DIGEST 32u
#define MOST_HEAD ((uint64_t)64 << 20)
#define MOST_BYTES ((uint64_t)4 << 30)
#define MOST_TABLES 65536u
#define MOST_SYMBOLS 65536u
#define MOST_SECTIONS 4096u
#define MOST_FILES 4096u
#define MOST_PATH 255u
#define MOST_SIGNATURE ((uint64_t)1 << 20)
#define MOST_PIECES ((size_t)65536) /* of all files */
#define MOST_CLASSES 16u
#define MOST_COUNT ((uint64_t)1 << 24)
#define MOST_AHEAD (((uint64_t)1 << 33) - 1)
#define PARTS ((uint32_t)1 << 24)         /* of a table */
#define BUCKETED_TABLES ((size_t)32 << 20) /* bytes of tables; what comes later is searched without buckets */
#define CHUNK 4096u                        /* symbols decoded at a time */
#define RUNS 512u                          /* places that they go to */

enum { CODEC_NONE, CODEC_ZSTD, CODEC_LZMA, CODEC_RANGE, CODEC_BASE };
enum { ROLE_NONE, ROLE_REST, ROLE_RAW, ROLE_CODES };
enum { MODE_RAW, MODE_CODED, MODE_SPLIT };

typedef struct {
    uint64_t lo;
    const uint8_t *frequencies; /* as they lie in the head */
    uint32_t n;
    uint32_t shift;   /* a quantile less so many bits is the index of its bucket */
    uint32_t *left;   /* n + 1, null until a plane needs the table */
    uint16_t *bucket; /* the symbol in which a bucket begins; null: bisect */
} table;

typedef struct {
    const uint8_t *data; /* as it lies in the body */
    size_t bytes;
    size_t size; /* decoded */
    const uint8_t *sha256;
    size_t used;          /* by the files of the head so far */
    size_t last;          /* the last file that names it */
    uint8_t *decoded;     /* null, or kept for the files to come */
    uint8_t codec, role;
} section;

typedef struct {
    const char *path;
    const uint8_t *sha256;
    const uint8_t *pieces; /* where they begin in the head */
    uint64_t piece_count;
    size_t size;
    size_t same;              /* the file that it is a copy of, else its own index */
    size_t rest_at, raw_at;   /* where its part of the section begins */
    uint32_t rest, raw, codes; /* one more than the index, 0 for none */
    fw_kind kind;
} file;

struct fw_bundle {
    fw_limits limits;
    uint8_t identity[DIGEST];
    uint8_t *head_memory;
    const uint8_t *head;
    size_t head_size;
    const uint8_t *base_identity;
    table *tables;
    section *sections;
    file *files;
    char *paths;
    size_t table_count, section_count, file_count;
    size_t table_bytes;
    fw_bundle *base;
    uint8_t *base_bytes; /* its artifact files, one behind the other; null until they are needed */
    size_t base_size;
};

/* ---- memory ---- */

static void *take(const fw_bundle *b, size_t bytes)
{
    size_t wanted = bytes == 0 ? 1 : bytes;
    return b->limits.allocate ? b->limits.allocate(b->limits.user, wanted) : malloc(wanted);
}

static void *take_array(const fw_bundle *b, size_t count, size_t each)
{
    void *memory;
    if (count > SIZE_MAX / 2 / each) return NULL;
    memory = take(b, count * each);
    if (memory) memset(memory, 0, count * each);
    return memory;
}

static void give(const fw_bundle *b, void *pointer)
{
    if (!pointer) return;
    if (b->limits.release) b->limits.release(b->limits.user, pointer);
    else free(pointer);
}

/* ---- SHA-256 (FIPS 180-4) ---- */

static const uint32_t SHA_K[64] = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

#define ROTR(x, k) (((x) >> (k)) | ((x) << (32 - (k))))
/* Word i of the message's schedule, in a ring of the last sixteen; 16 rounds know the first ones. */
#define NEXT(i)                                                                                             \
    (w[(i) & 15] += (ROTR(w[((i) + 1) & 15], 7) ^ ROTR(w[((i) + 1) & 15], 18) ^ w[((i) + 1) & 15] >> 3)         \
                    + (ROTR(w[((i) + 14) & 15], 17) ^ ROTR(w[((i) + 14) & 15], 19) ^ w[((i) + 14) & 15] >> 10) \
                    + w[((i) + 9) & 15])
/* A round; it renames the eight words instead of moving them. */
#define ROUND(a, b, c, d, e, f, g, h, i, word)                                                             \
    do {                                                                                                  \
        h += (ROTR(e, 6) ^ ROTR(e, 11) ^ ROTR(e, 25)) + (g ^ (e & (f ^ g))) + SHA_K[k + (i)] + (word);         \
        d += h;                                                                                           \
        h += (ROTR(a, 2) ^ ROTR(a, 13) ^ ROTR(a, 22)) + ((a & b) | (c & (a | b)));                           \
    } while (0)
#define EIGHT_ROUNDS(i, word)                            \
    do {                                                 \
        ROUND(a, b, c, d, e, f, g, h, (i), word(i));         \
        ROUND(h, a, b, c, d, e, f, g, (i) + 1, word((i) + 1)); \
        ROUND(g, h, a, b, c, d, e, f, (i) + 2, word((i) + 2)); \
        ROUND(f, g, h, a, b, c, d, e, (i) + 3, word((i) + 3)); \
        ROUND(e, f, g, h, a, b, c, d, (i) + 4, word((i) + 4)); \
        ROUND(d, e, f, g, h, a, b, c, (i) + 5, word((i) + 5)); \
        ROUND(c, d, e, f, g, h, a, b, (i) + 6, word((i) + 6)); \
        ROUND(b, c, d, e, f, g, h, a, (i) + 7, word((i) + 7)); \
    } while (0)
#define FIRST(i) w[i]

static void sha_block(uint32_t state[8], const uint8_t *p)
{
    uint32_t w[16], a = state[0], b = state[1], c = state[2], d = state[3];
    uint32_t e = state[4], f = state[5], g = state[6], h = state[7];
    unsigned i, k = 0;
    for (i = 0; i < 16; i++, p += 4)
        w[i] = (uint32_t)p[0] << 24 | (uint32_t)p[1] << 16 | (uint32_t)p[2] << 8 | p[3];
    EIGHT_ROUNDS(0, FIRST);
    EIGHT_ROUNDS(8, FIRST);
    for (k = 16; k < 64; k += 16) {
        EIGHT_ROUNDS(0, NEXT);
        EIGHT_ROUNDS(8, NEXT);
    }
    state[0] += a, state[1] += b, state[2] += c, state[3] += d;
    state[4] += e, state[5] += f, state[6] += g, state[7] += h;
}

static void sha256(const uint8_t *data, size_t size, uint8_t digest[DIGEST])
{
    uint32_t state[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                         0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
    uint8_t tail[128] = {0};
    size_t left = size % 64, padded = left < 56 ? 64 : 128, at;
    uint64_t bits = (uint64_t)size * 8;
    int i;
    for (at = 0; at + left < size; at += 64) sha_block(state, data + at);
    if (left) memcpy(tail, data + at, left);
    tail[left] = 0x80;
    for (i = 0; i < 8; i++) tail[padded - 1 - (size_t)i] = (uint8_t)(bits >> 8 * i);
    for (at = 0; at < padded; at += 64) sha_block(state, tail + at);
    for (i = 0; i < 32; i++) digest[i] = (uint8_t)(state[i / 4] >> (24 - 8 * (i % 4)));
}

static int digest_is(const uint8_t *data, size_t size, const uint8_t *expected)
{
    uint8_t digest[DIGEST];
    sha256(data, size, digest);
    return memcmp(digest, expected, DIGEST) == 0;
}

/* ---- LZMA1, a raw stream behind its byte of properties ---- */

enum {
    LZ_IS_MATCH = 0,                      /* state << 4 | position */
    LZ_IS_REP = LZ_IS_MATCH + 12 * 16,    /* state */
    LZ_IS_REP0 = LZ_IS_REP + 12,
    LZ_IS_REP1 = LZ_IS_REP0 + 12,
    LZ_IS_REP2 = LZ_IS_REP1 + 12,
    LZ_IS_REP0_LONG = LZ_IS_REP2 + 12,    /* state << 4 | position */
    LZ_SLOT = LZ_IS_REP0_LONG + 12 * 16,  /* length class << 6 */
    LZ_SPECIAL = LZ_SLOT + 4 * 64,        /* distances of 4 to 127 */
    LZ_ALIGN = LZ_SPECIAL + 128,
    LZ_LENGTH = LZ_ALIGN + 16,            /* of matches: two choices, low, middle, high */
    LZ_REP_LENGTH = LZ_LENGTH + 2 + 16 * 8 + 16 * 8 + 256,
    LZ_LITERAL = LZ_REP_LENGTH + 2 + 16 * 8 + 16 * 8 + 256
};

typedef struct {
    const uint8_t *at, *end;
    uint32_t range, code;
    int over; /* the input ended before what is decoded */
    uint16_t *odds;
} lzma;

static void lz_refill(lzma *z)
{
    if (z->range >= (uint32_t)1 << 24) return;
    z->range <<= 8;
    z->code <<= 8;
    if (z->at < z->end) z->code |= *z->at++;
    else z->over = 1;
}

static uint32_t lz_bit(lzma *z, size_t which)
{
    uint16_t *odds = z->odds + which;
    uint32_t bound;
    lz_refill(z);
    bound = (z->range >> 11) * *odds;
    if (z->code < bound) {
        z->range = bound;
        *odds = (uint16_t)(*odds + ((2048u - *odds) >> 5));
        return 0;
    }
    z->range -= bound;
    z->code -= bound;
    *odds = (uint16_t)(*odds - (*odds >> 5));
    return 1;
}

static uint32_t lz_tree(lzma *z, size_t which, unsigned bits)
{
    uint32_t m = 1;
    unsigned i;
    for (i = 0; i < bits; i++) m = m << 1 | lz_bit(z, which + m);
    return m - ((uint32_t)1 << bits);
}

static uint32_t lz_reverse(lzma *z, size_t which, unsigned bits)
{
    uint32_t m = 1, value = 0;
    unsigned i;
    for (i = 0; i < bits; i++) {
        uint32_t bit = lz_bit(z, which + m);
        m = m << 1 | bit;
        value |= bit << i;
    }
    return value;
}

static uint32_t lz_length(lzma *z, size_t which, size_t position)
{
    if (!lz_bit(z, which)) return 2 + lz_tree(z, which + 2 + position * 8, 3);
    if (!lz_bit(z, which + 1)) return 10 + lz_tree(z, which + 2 + 128 + position * 8, 3);
    return 18 + lz_tree(z, which + 2 + 256, 8);
}

static uint32_t lz_distance(lzma *z, uint32_t length)
{
    uint32_t slot = lz_tree(z, LZ_SLOT + (size_t)(length < 6 ? length - 2 : 3) * 64, 6), distance, direct;
    unsigned bits = slot / 2 - 1;
    if (slot < 4) return slot;
    distance = (2 | (slot & 1)) << bits;
    if (slot < 14) return distance + lz_reverse(z, LZ_SPECIAL + distance - slot, bits);
    for (direct = 0, bits -= 4; bits; bits--) {
        lz_refill(z);
        z->range >>= 1;
        direct <<= 1;
        if (z->code >= z->range) {
            z->code -= z->range;
            direct |= 1;
        }
    }
    return distance + (direct << 4) + lz_reverse(z, LZ_ALIGN, 4);
}

static uint8_t lz_literal(lzma *z, size_t which, int matched, uint32_t other)
{
    uint32_t m = 1;
    if (matched) {
        uint32_t same = 0x100;
        while (m < 0x100) {
            uint32_t bit;
            other <<= 1;
            bit = lz_bit(z, which + same + (other & same) + m);
            m = m << 1 | bit;
            same &= bit ? other : ~other;
        }
        return (uint8_t)m;
    }
    while (m < 0x100) m = m << 1 | lz_bit(z, which + m);
    return (uint8_t)m;
}

/* Behind an end marker nothing is left in the coder. */
static int lz_ends(lzma *z)
{
    lz_refill(z);
    return z->over || z->code == 0;
}

/* Decodes `size` bytes, and as liblzma does the symbol behind them where the input has all of it: it may be anything
 * that an encoder writes. */
static int lz_decode(lzma *z, uint8_t *out, size_t size, unsigned lc, unsigned lp, unsigned pb)
{
    uint32_t rep[4] = {0, 0, 0, 0}, length, k;
    size_t at = 0, state = 0;
    for (;;) {
        size_t position = at & (((size_t)1 << pb) - 1);
        int behind = at == size;
        if (!lz_bit(z, LZ_IS_MATCH + state * 16 + position)) {
            size_t context = (at & (((size_t)1 << lp) - 1)) << lc | (at ? (size_t)out[at - 1] >> (8 - lc) : 0);
            uint8_t other = state >= 7 ? out[at - rep[0] - 1] : 0;
            uint8_t byte = lz_literal(z, LZ_LITERAL + 0x300 * context, state >= 7, other);
            if (z->over || behind) return behind;
            out[at++] = byte;
            state = state < 4 ? 0 : state < 10 ? state - 3 : state - 6;
            continue;
        }
        if (!lz_bit(z, LZ_IS_REP + state)) {
            rep[3] = rep[2], rep[2] = rep[1], rep[1] = rep[0];
            length = lz_length(z, LZ_LENGTH, position);
            rep[0] = lz_distance(z, length);
            if (rep[0] == UINT32_MAX) return behind && lz_ends(z);
            state = state < 7 ? 7 : 10;
        } else if (lz_bit(z, LZ_IS_REP0 + state)) {
            uint32_t distance;
            k = !lz_bit(z, LZ_IS_REP1 + state) ? 1 : !lz_bit(z, LZ_IS_REP2 + state) ? 2 : 3;
            for (distance = rep[k]; k; k--) rep[k] = rep[k - 1];
            rep[0] = distance;
            length = lz_length(z, LZ_REP_LENGTH, position);
            state = state < 7 ? 8 : 11;
        } else if (lz_bit(z, LZ_IS_REP0_LONG + state * 16 + position)) {
            length = lz_length(z, LZ_REP_LENGTH, position);
            state = state < 7 ? 8 : 11;
        } else {
            length = 1;
            state = state < 7 ? 9 : 11;
        }
        if (z->over) return behind;
        if (rep[0] >= at) return 0;
        if (behind) return 1;
        for (; length && at < size; length--, at++) out[at] = out[at - rep[0] - 1];
        if (length) return 1;
    }
}

/* The section is its properties, then the stream. */
static fw_status lz_section(const fw_bundle *b, const uint8_t *data, size_t bytes, uint8_t *out, size_t size)
{
    unsigned lc, lp, pb;
    size_t odds, i;
    lzma z;
    int fine;
    if (bytes < 1 || data[0] >= 225 || (uint64_t)size > UINT32_MAX) return FW_BAD_SECTION;
    lc = data[0] % 9u, lp = data[0] / 9u % 5u, pb = data[0] / 45u;
    if (lc + lp > 4) return FW_BAD_SECTION;
    if (size == 0) return FW_OK;
    if (bytes < 6 || data[1] != 0) return FW_BAD_SECTION;
    odds = LZ_LITERAL + ((size_t)0x300 << (lc + lp));
    z.odds = take_array(b, odds, sizeof *z.odds);
    if (!z.odds) return FW_NO_MEMORY;
    for (i = 0; i < odds; i++) z.odds[i] = 1024;
    z.range = UINT32_MAX;
    z.code = (uint32_t)data[2] << 24 | (uint32_t)data[3] << 16 | (uint32_t)data[4] << 8 | data[5];
    z.at = data + 6;
    z.end = data + bytes;
    z.over = 0;
    fine = lz_decode(&z, out, size, lc, lp, pb);
    give(b, z.odds);
    return fine ? FW_OK : FW_BAD_SECTION;
}

/* ---- zstd ---- */

static fw_status zstd_section(const uint8_t *data, size_t bytes, const uint8_t *prefix, size_t prefix_size,
                              uint8_t *out, size_t size)
{
    static const uint8_t magic[4] = {0x28, 0xb5, 0x2f, 0xfd};
    unsigned long long content;
    ZSTD_DCtx *context;
    size_t found;
    if (bytes < 4 || memcmp(data, magic, 4) != 0) return FW_BAD_SECTION; /* skippable and old frames are none */
    content = ZSTD_getFrameContentSize(data, bytes);
    if (content == ZSTD_CONTENTSIZE_ERROR) return FW_BAD_SECTION;
    if (content != ZSTD_CONTENTSIZE_UNKNOWN && content != size) return FW_BAD_SECTION;
    if (ZSTD_findFrameCompressedSize(data, bytes) != bytes) return FW_BAD_SECTION;
    context = ZSTD_createDCtx();
    if (!context) return FW_NO_MEMORY;
    found = prefix_size ? ZSTD_DCtx_refPrefix(context, prefix, prefix_size) : 0;
    if (!ZSTD_isError(found)) found = ZSTD_decompressDCtx(context, out, size, data, bytes);
    ZSTD_freeDCtx(context);
    return !ZSTD_isError(found) && found == size ? FW_OK : FW_BAD_SECTION;
}

/* ---- the head ---- */

typedef struct {
    const uint8_t *at, *end;
} cursor;

static size_t left_of(const cursor *c) { return (size_t)(c->end - c->at); }

static const uint8_t *read_bytes(cursor *c, uint64_t count)
{
    const uint8_t *found = c->at;
    if (count > left_of(c)) return NULL;
    c->at += (size_t)count;
    return found;
}

static int read_u8(cursor *c, unsigned *value)
{
    if (c->at == c->end) return 0;
    *value = *c->at++;
    return 1;
}

static int read_varint(cursor *c, uint64_t *value)
{
    unsigned byte, shift;
    *value = 0;
    for (shift = 0; shift < 63; shift += 7) {
        if (!read_u8(c, &byte)) return 0;
        *value |= (uint64_t)(byte & 127) << shift;
        if (byte < 128) return 1;
    }
    return 0;
}

static int read_within(cursor *c, uint64_t least, uint64_t most, uint64_t *value)
{
    return read_varint(c, value) && *value >= least && *value <= most;
}

static uint64_t read_fixed(const uint8_t *p, unsigned bytes)
{
    uint64_t value = 0;
    while (bytes--) value = value << 8 | p[bytes];
    return value;
}

/* Paths. */

static unsigned lower(unsigned letter) { return letter >= 'A' && letter <= 'Z' ? letter + 32 : letter; }

static int utf8_is_fine(const uint8_t *p, size_t size)
{
    size_t at = 0;
    while (at < size) {
        unsigned first = p[at++], more = first < 0x80 ? 0 : first < 0xe0 ? 1 : first < 0xf0 ? 2 : 3;
        unsigned low = first == 0xe0 ? 0xa0 : first == 0xf0 ? 0x90 : 0x80;
        unsigned high = first == 0xed ? 0x9f : first == 0xf4 ? 0x8f : 0xbf;
        if ((first >= 0x80 && first < 0xc2) || first > 0xf4 || more > size - at) return 0;
        for (; more; more--, at++, low = 0x80, high = 0xbf)
            if (p[at] < low || p[at] > high) return 0;
    }
    return 1;
}

/* Whether the name, less what stands behind its first dot and blanks before that, is a device of Windows. */
static int is_device(const uint8_t *name, size_t size)
{
    static const char *const devices[] = {"con", "prn", "aux", "nul", "conin$", "conout$", "com", "lpt"};
    size_t stem = 0, i, j;
    while (stem < size && name[stem] != '.') stem++;
    while (stem > 0 && name[stem - 1] == ' ') stem--;
    for (i = 0; i < sizeof devices / sizeof *devices; i++) {
        size_t length = strlen(devices[i]);
        if (stem < length) continue;
        for (j = 0; j < length && lower(name[j]) == (unsigned)devices[i][j]; j++) continue;
        if (j < length) continue;
        if (i < 6 && stem == length) return 1;
        if (i >= 6 && stem == length + 1 && name[length] >= '0' && name[length] <= '9') return 1;
        if (i >= 6 && stem == length + 2 && name[length] == 0xc2 /* superscript 1, 2 and 3 */
            && (name[length + 1] == 0xb9 || name[length + 1] == 0xb2 || name[length + 1] == 0xb3))
            return 1;
    }
    return 0;
}

static int name_is_fine(const uint8_t *name, size_t size)
{
    size_t i;
    if (size == 0 || name[size - 1] == '.' || name[size - 1] == ' ') return 0; /* so neither "." nor ".." */
    for (i = 0; i < size; i++) {
        if (name[i] < 0x20 || name[i] == 0x7f || strchr("\\:*?\"<>|", name[i])) return 0;
        if (name[i] == 0xc2 && i + 1 < size && name[i + 1] < 0xa0) return 0; /* U+0080 to U+009F */
    }
    return !is_device(name, size);
}

static int path_is_fine(const uint8_t *path, size_t size)
{
    size_t begin = 0, i;
    if (size > MOST_PATH || !utf8_is_fine(path, size)) return 0;
    for (i = 0; i <= size; i++) {
        if (i < size && path[i] != '/') continue;
        if (!name_is_fine(path + begin, i - begin)) return 0;
        begin = i + 1;
    }
    return 1;
}

static fw_status read_path(cursor *c, const uint8_t **path, size_t *size)
{
    uint64_t length;
    if (!read_varint(c, &length)) return FW_BAD_HEAD;
    *path = read_bytes(c, length);
    *size = (size_t)length;
    if (!*path) return FW_BAD_HEAD;
    return path_is_fine(*path, *size) ? FW_OK : FW_BAD_PATH;
}

/* Case is ignored, and '/' sorts before all else, so that what is in a folder follows its name at once. */
static int compare_paths(const void *one, const void *other)
{
    const char *p = *(const char *const *)one, *q = *(const char *const *)other;
    for (;; p++, q++) {
        unsigned a = lower((unsigned char)*p), b = lower((unsigned char)*q);
        a = a == '/' ? 1 : a, b = b == '/' ? 1 : b;
        if (a != b) return a < b ? -1 : 1;
        if (!a) return 0;
    }
}

static fw_status check_apart(const fw_bundle *b)
{
    const char **sorted = take_array(b, b->file_count, sizeof *sorted);
    fw_status status = FW_OK;
    size_t i;
    if (!sorted) return FW_NO_MEMORY;
    for (i = 0; i < b->file_count; i++) sorted[i] = b->files[i].path;
    if (b->file_count) qsort(sorted, b->file_count, sizeof *sorted, compare_paths);
    for (i = 1; i < b->file_count && status == FW_OK; i++) {
        const char *p = sorted[i - 1], *q = sorted[i];
        while (*p && lower((unsigned char)*p) == lower((unsigned char)*q)) p++, q++;
        if (!*p && (!*q || *q == '/')) status = FW_BAD_PATH;
    }
    give(b, sorted);
    return status;
}

/* Pieces. */

typedef struct {
    size_t inner, count;
    uint32_t classes; /* 1 where there is no map */
    uint32_t table;
} map;

typedef struct {
    unsigned mode;
    map maps[2];
    uint32_t contexts[MOST_CLASSES * MOST_CLASSES];
    uint32_t common, others; /* of a split */
} coding;

typedef struct {
    size_t gap, n, bytes;
    unsigned bits, planes;
    int rotated, against, coded;
    size_t raw; /* bytes of its raw planes */
    const uint8_t *palette;
    uint32_t colours;
    const uint8_t *base_path;
    size_t base_path_size;
    uint64_t base_at;
    coding codings[4];
} piece;

static int read_index(cursor *c, const fw_bundle *b, uint32_t *table_index)
{
    uint64_t value;
    if (!read_varint(c, &value) || value >= b->table_count) return 0;
    *table_index = (uint32_t)value;
    return 1;
}

static int read_map(cursor *c, const fw_bundle *b, size_t n, map *m)
{
    uint64_t inner, count, classes, most = n ? n - 1 : 0;
    if (!read_varint(c, &inner) || inner < 1) return 0;
    if (!read_within(c, 1, MOST_COUNT, &count) || !read_within(c, 2, MOST_CLASSES, &classes)) return 0;
    if (count > 1 && inner > most / (count - 1)) return 0; /* (count - 1) * inner is below n */
    m->inner = (size_t)(inner < n ? inner : n ? n : 1);
    m->count = (size_t)count;
    m->classes = (uint32_t)classes;
    return read_index(c, b, &m->table);
}

static int read_coding(cursor *c, const fw_bundle *b, size_t n, uint32_t limit, int plain, coding *k)
{
    unsigned flags;
    uint64_t common;
    uint32_t i;
    if (!read_u8(c, &k->mode) || k->mode > MODE_SPLIT) return 0;
    if (k->mode == MODE_RAW) return plain;
    if (!read_u8(c, &flags) || flags > 3) return 0;
    for (i = 0; i < 2; i++) {
        k->maps[i].inner = n ? n : 1, k->maps[i].count = k->maps[i].classes = 1;
        if ((flags >> i & 1) && !read_map(c, b, n, &k->maps[i])) return 0;
    }
    for (i = 0; i < k->maps[0].classes * k->maps[1].classes; i++)
        if (!read_index(c, b, &k->contexts[i])) return 0;
    if (k->mode == MODE_CODED) return 1;
    if (!read_varint(c, &common) || common >= limit) return 0;
    k->common = (uint32_t)common;
    return read_index(c, b, &k->others);
}

/* The next gap and piece of a file of which so many bytes are left. */
static fw_status read_piece(cursor *c, const fw_bundle *b, size_t left, piece *p)
{
    uint64_t gap, n, k;
    unsigned form, i;
    uint32_t limit;
    fw_status status;
    if (!read_varint(c, &gap) || !read_varint(c, &n) || !read_u8(c, &form)) return FW_BAD_HEAD;
    p->bits = 1u << (form & 7);
    if ((form & 7) > 5 || form > 63 || gap > left) return FW_BAD_PIECE;
    p->gap = (size_t)gap;
    left -= p->gap;
    if (p->bits < 8) {
        if (n % (8 / p->bits) || n / (8 / p->bits) > left) return FW_BAD_PIECE;
        p->bytes = (size_t)(n / (8 / p->bits));
    } else {
        if (n > left / (p->bits / 8)) return FW_BAD_PIECE;
        p->bytes = (size_t)n * (p->bits / 8);
    }
    if (n > SIZE_MAX / 4) return FW_TOO_LARGE; /* bits, on a machine of 32 */
    p->n = (size_t)n;
    p->rotated = (form & 8) != 0;
    p->against = (form & 32) != 0;
    if ((p->rotated && p->bits < 16) || ((form & 16) && (p->bits < 8 || (form & ~7u) != 16))) return FW_BAD_PIECE;
    if (p->against) {
        if (!b->base_identity) return FW_BAD_PIECE;
        status = read_path(c, &p->base_path, &p->base_path_size);
        if (status != FW_OK) return status;
        if (!read_varint(c, &p->base_at)) return FW_BAD_HEAD;
    }
    p->palette = NULL;
    p->planes = p->bits < 8 ? 1 : p->bits / 8;
    limit = p->bits < 8 ? 1u << p->bits : 256;
    if (form & 16) {
        if (!read_within(c, 1, MOST_SYMBOLS, &k)) return FW_BAD_PIECE;
        p->palette = read_bytes(c, k * p->planes);
        if (!p->palette) return FW_BAD_HEAD;
        p->colours = limit = (uint32_t)k;
        p->planes = 1;
    }
    p->coded = 0;
    for (i = 0, p->raw = 0; i < p->planes; i++) {
        if (!read_coding(c, b, p->n, limit, p->bits >= 8 && !p->palette, &p->codings[i])) return FW_BAD_PIECE;
        if (p->codings[i].mode == MODE_RAW) p->raw += p->n; /* no more than the piece's bytes */
        else p->coded = 1;
    }
    return FW_OK;
}

/* Tables, sections, files. */

static fw_status read_tables(cursor *c, fw_bundle *b)
{
    uint64_t count, n, i, j;
    if (!read_within(c, 0, MOST_TABLES, &count) || count > left_of(c) / 3) return FW_BAD_HEAD;
    b->tables = take_array(b, (size_t)count, sizeof *b->tables);
    if (!b->tables) return FW_NO_MEMORY;
    b->table_count = (size_t)count;
    for (i = 0; i < count; i++) {
        table *t = &b->tables[i];
        if (!read_varint(c, &t->lo) || !read_within(c, 1, MOST_SYMBOLS, &n)) return FW_BAD_HEAD;
        t->n = (uint32_t)n;
        t->frequencies = read_bytes(c, n);
        if (!t->frequencies) return FW_BAD_HEAD;
        for (j = 0; j < n && t->frequencies[j] == 0; j++) continue;
        if (j == n) return FW_BAD_TABLE;
    }
    return FW_OK;
}

static fw_status read_sections(cursor *c, fw_bundle *b, const uint8_t *body, size_t body_size)
{
    uint64_t count, bytes, size, whole = 0;
    unsigned codec;
    size_t i;
    if (!read_within(c, 0, MOST_SECTIONS, &count) || count > left_of(c) / 35) return FW_BAD_HEAD;
    b->sections = take_array(b, (size_t)count, sizeof *b->sections);
    if (!b->sections) return FW_NO_MEMORY;
    b->section_count = (size_t)count;
    for (i = 0; i < b->section_count; i++) {
        section *s = &b->sections[i];
        if (!read_u8(c, &codec) || !read_varint(c, &bytes) || !read_varint(c, &size)) return FW_BAD_HEAD;
        s->sha256 = read_bytes(c, DIGEST);
        if (!s->sha256) return FW_BAD_HEAD;
        if (codec > CODEC_BASE) return FW_NEWER;
        if (codec == CODEC_BASE && !b->base_identity) return FW_BAD_SECTIONS;
        if ((codec == CODEC_NONE || codec == CODEC_RANGE) && bytes != size) return FW_BAD_SECTIONS;
        if ((codec == CODEC_RANGE && size % 4) || bytes > body_size) return FW_BAD_SECTIONS;
        if (size > b->limits.max_bytes - whole) return FW_TOO_LARGE;
        whole += size;
        s->codec = (uint8_t)codec;
        s->data = body;
        s->bytes = (size_t)bytes;
        s->size = (size_t)size;
        body += s->bytes;
        body_size -= s->bytes;
    }
    return body_size ? FW_BAD_SECTIONS : FW_OK;
}

/* Claims a section for a file: in one role only, and codes for one file only. */
static int claim(fw_bundle *b, uint32_t number, uint8_t role, size_t index)
{
    section *s;
    if (number == 0) return 1;
    s = &b->sections[number - 1];
    if (s->role != ROLE_NONE && (s->role != role || role == ROLE_CODES)) return 0;
    if ((role == ROLE_CODES) != (s->codec == CODEC_RANGE)) return 0;
    s->role = role;
    s->last = index;
    return 1;
}

static int use_up(fw_bundle *b, uint32_t number, size_t bytes, size_t *at)
{
    section *s;
    *at = 0;
    if (number == 0) return bytes == 0;
    s = &b->sections[number - 1];
    if (bytes > s->size - s->used) return 0;
    *at = s->used;
    s->used += bytes;
    return 1;
}

static fw_status read_layout(cursor *c, fw_bundle *b, size_t index, size_t *pieces)
{
    file *f = &b->files[index];
    uint64_t rest, raw, codes, i;
    size_t left = f->size, inside = 0, raws = 0;
    int coded = 0;
    if (!read_within(c, 0, b->section_count, &rest) || !read_within(c, 0, b->section_count, &raw)
        || !read_within(c, 0, b->section_count, &codes))
        return FW_BAD_HEAD;
    f->rest = (uint32_t)rest, f->raw = (uint32_t)raw, f->codes = (uint32_t)codes;
    if (!claim(b, f->rest, ROLE_REST, index) || !claim(b, f->raw, ROLE_RAW, index)
        || !claim(b, f->codes, ROLE_CODES, index))
        return FW_BAD_SECTIONS;
    if (!read_within(c, 0, MOST_PIECES - *pieces, &f->piece_count)) return FW_BAD_HEAD;
    *pieces += (size_t)f->piece_count;
    f->pieces = c->at;
    for (i = 0; i < f->piece_count; i++) {
        piece p;
        fw_status status = read_piece(c, b, left, &p);
        if (status != FW_OK) return status;
        left -= p.gap + p.bytes;
        inside += p.bytes;
        raws += p.raw;
        coded |= p.coded;
    }
    if (coded != (f->codes != 0)) return FW_BAD_SECTIONS;
    if (!use_up(b, f->rest, f->size - inside, &f->rest_at)) return FW_BAD_SECTIONS;
    return use_up(b, f->raw, raws, &f->raw_at) ? FW_OK : FW_BAD_SECTIONS;
}

static fw_status read_file(cursor *c, fw_bundle *b, size_t index, size_t *pieces, uint64_t *whole, char **paths)
{
    file *f = &b->files[index];
    const uint8_t *path;
    size_t length;
    unsigned kind, how;
    uint64_t size, same;
    fw_status status = read_path(c, &path, &length);
    if (status != FW_OK) return status;
    if (!read_u8(c, &kind) || !read_varint(c, &size)) return FW_BAD_HEAD;
    f->sha256 = read_bytes(c, DIGEST);
    if (!f->sha256 || !read_u8(c, &how) || kind > FW_PROBE || how > 1) return FW_BAD_HEAD;
    if (size > b->limits.max_bytes - *whole) return FW_TOO_LARGE;
    *whole += size;
    memcpy(*paths, path, length);
    f->path = *paths;
    *paths += length + 1;
    f->kind = (fw_kind)kind;
    f->size = (size_t)size;
    f->same = index;
    if (how == 0) return read_layout(c, b, index, pieces);
    if (!read_varint(c, &same) || same >= index) return FW_BAD_HEAD;
    f->same = (size_t)same;
    if (b->files[f->same].same != f->same || b->files[f->same].size != f->size
        || memcmp(b->files[f->same].sha256, f->sha256, DIGEST) != 0)
        return FW_BAD_HEAD;
    return FW_OK;
}

static fw_status read_files(cursor *c, fw_bundle *b)
{
    uint64_t count, whole = 0;
    size_t i, pieces = 0;
    char *paths;
    fw_status status = FW_OK;
    if (!read_within(c, 0, MOST_FILES, &count) || count > left_of(c) / 37) return FW_BAD_HEAD;
    b->files = take_array(b, (size_t)count, sizeof *b->files);
    b->paths = paths = take_array(b, (size_t)count, MOST_PATH + 1);
    if (!b->files || !b->paths) return FW_NO_MEMORY;
    for (i = 0; i < (size_t)count && status == FW_OK; i++) {
        status = read_file(c, b, i, &pieces, &whole, &paths);
        b->file_count = i + 1;
    }
    for (i = 0; i < b->section_count && status == FW_OK; i++) {
        const section *s = &b->sections[i];
        if (s->role == ROLE_NONE || (s->role != ROLE_CODES && s->used != s->size)) status = FW_BAD_SECTIONS;
    }
    return status == FW_OK ? check_apart(b) : status;
}

static fw_status read_head(fw_bundle *b, const uint8_t *body, size_t body_size)
{
    cursor c;
    unsigned needs;
    fw_status status;
    c.at = b->head, c.end = b->head + b->head_size;
    if (!read_u8(&c, &needs) || needs > 1) return FW_BAD_HEAD;
    if (needs && !(b->base_identity = read_bytes(&c, DIGEST))) return FW_BAD_HEAD;
    if ((status = read_tables(&c, b)) != FW_OK) return status;
    if ((status = read_sections(&c, b, body, body_size)) != FW_OK) return status;
    if ((status = read_files(&c, b)) != FW_OK) return status;
    return c.at == c.end ? FW_OK : FW_BAD_HEAD;
}

/* ---- tables ---- */

static uint64_t frequency(unsigned byte) { return byte < 32 ? byte : (uint64_t)(16 + byte % 16) << (byte / 16 - 1); }

/* Where each symbol begins among 2^24 parts. Each line rounds once, so that no compiler can fuse two into one. */
static void fill_left(table *t)
{
    uint64_t sum = 0, before = 0;
    double scale;
    uint32_t i;
    for (i = 0; i < t->n; i++) sum += frequency(t->frequencies[i]);
    scale = (double)(PARTS - t->n) / (double)sum;
    for (i = 0; i < t->n; i++) {
        double begin = (double)before * scale;
        t->left[i] = (uint32_t)begin + i; /* (uint32_t) is floor: begin is at least 0 and below 2^24 */
        before += frequency(t->frequencies[i]);
    }
    t->left[t->n] = PARTS;
}

/* For each bucket the symbol in which it begins; the others are found by stepping on from there. */
static void fill_buckets(table *t, uint32_t buckets)
{
    uint32_t i, symbol = 0;
    for (i = 0; i < buckets; i++) {
        while (t->left[symbol + 1] <= i << t->shift) symbol++;
        t->bucket[i] = (uint16_t)symbol;
    }
}

static fw_status ready(fw_bundle *b, table *t)
{
    unsigned bits = 2;
    size_t bytes;
    if (t->left || t->n == 1) return FW_OK;
    while (((uint32_t)1 << bits) < t->n) bits++;
    bits = bits + 4 <= 12 ? bits + 4 : bits + 1 <= 12 ? 12 : bits + 1;
    bytes = ((size_t)t->n + 1) * sizeof *t->left;
    t->left = take(b, bytes);
    if (!t->left) return FW_NO_MEMORY;
    fill_left(t);
    t->shift = 24 - bits;
    bytes += ((size_t)1 << bits) * sizeof *t->bucket;
    if (t->n == 2 || bytes > BUCKETED_TABLES - b->table_bytes) return FW_OK;
    t->bucket = take(b, ((size_t)1 << bits) * sizeof *t->bucket);
    if (!t->bucket) return FW_NO_MEMORY;
    fill_buckets(t, (uint32_t)1 << bits);
    b->table_bytes += bytes;
    return FW_OK;
}

/* ---- the range coder ---- */

typedef struct {
    const uint8_t *at, *end;
    uint64_t range, ahead; /* ahead is point - lower of the page: no more of the two is ever needed */
} coder;

static uint64_t next_word(const uint8_t **at, const uint8_t *end)
{
    const uint8_t *p = *at;
    if (p == end) return 0;
    *at = p + 4;
    return (uint64_t)p[0] | (uint64_t)p[1] << 8 | (uint64_t)p[2] << 16 | (uint64_t)p[3] << 24;
}

static void coder_begin(coder *c, const uint8_t *words, size_t bytes)
{
    c->at = words;
    c->end = words ? words + bytes : words;
    c->range = UINT64_MAX;
    c->ahead = next_word(&c->at, c->end) << 32;
    c->ahead |= next_word(&c->at, c->end);
}

static uint32_t bisect(const uint32_t *left, uint32_t n, uint32_t quantile)
{
    uint32_t low = 0, high = n; /* left[low] <= quantile < left[high] */
    while (high - low > 1) {
        uint32_t middle = low + (high - low) / 2;
        if (left[middle] <= quantile) low = middle;
        else high = middle;
    }
    return low;
}

/* Takes a symbol of `width` parts from `begin` on, with no branch on whether a word is due: none could foresee that. */
#define TAKE(begin, width)                                                             \
    do {                                                                               \
        uint64_t word = 0, due;                                                        \
        if (at != end)                                                                 \
            word = (uint64_t)at[0] | (uint64_t)at[1] << 8 | (uint64_t)at[2] << 16 | (uint64_t)at[3] << 24; \
        ahead -= scale * (begin);                                                      \
        range = scale * (width);                                                       \
        due = range >> 32 == 0;                                                        \
        range <<= due << 5;                                                            \
        ahead = ahead << (due << 5) | (word & (0 - due));                              \
        at += at != end ? due << 2 : 0;                                                \
    } while (0)

static int decode_two(coder *c, const table *t, uint16_t *symbols, size_t count)
{
    const uint8_t *at = c->at, *end = c->end;
    uint64_t range = c->range, ahead = c->ahead, first = t->left[1];
    size_t i;
    for (i = 0; i < count; i++) {
        uint64_t scale = range >> 24, second;
        if (ahead >= scale << 24) return 0;
        second = ahead >= scale * first;
        symbols[i] = (uint16_t)second;
        TAKE(first & (0 - second), second ? PARTS - first : first);
    }
    c->at = at, c->range = range, c->ahead = ahead;
    return 1;
}

static int decode_bucketed(coder *c, const table *t, uint16_t *symbols, size_t count)
{
    const uint32_t *left = t->left;
    const uint16_t *bucket = t->bucket;
    const uint8_t *at = c->at, *end = c->end;
    uint64_t range = c->range, ahead = c->ahead;
    uint32_t shift = t->shift;
    size_t i;
    for (i = 0; i < count; i++) {
        uint64_t scale = range >> 24;
        uint32_t quantile, symbol;
        if (ahead >= scale << 24) return 0;
        quantile = (uint32_t)(ahead / scale);
        for (symbol = bucket[quantile >> shift]; left[symbol + 1] <= quantile; symbol++) continue;
        symbols[i] = (uint16_t)symbol;
        TAKE(left[symbol], left[symbol + 1] - left[symbol]);
    }
    c->at = at, c->range = range, c->ahead = ahead;
    return 1;
}

static int decode_bisected(coder *c, const table *t, uint16_t *symbols, size_t count)
{
    const uint32_t *left = t->left;
    const uint8_t *at = c->at, *end = c->end;
    uint64_t range = c->range, ahead = c->ahead;
    size_t i;
    for (i = 0; i < count; i++) {
        uint64_t scale = range >> 24;
        uint32_t symbol;
        if (ahead >= scale << 24) return 0;
        symbol = bisect(left, t->n, (uint32_t)(ahead / scale));
        symbols[i] = (uint16_t)symbol;
        TAKE(left[symbol], left[symbol + 1] - left[symbol]);
    }
    c->at = at, c->range = range, c->ahead = ahead;
    return 1;
}

/* The next symbols by a table that is ready, less its lo. 0 where the words are none of an encoder's. */
static int decode(coder *c, const table *t, uint16_t *symbols, size_t count)
{
    if (t->n == 1) {
        memset(symbols, 0, count * sizeof *symbols);
        return 1;
    }
    if (t->n == 2) return decode_two(c, t, symbols, count);
    return t->bucket ? decode_bucketed(c, t, symbols, count) : decode_bisected(c, t, symbols, count);
}

/* Whether symbols and the table's lo stay below a limit. */
static int are_below(const table *t, const uint16_t *symbols, size_t count, uint32_t limit)
{
    size_t i;
    if (count == 0) return 1;
    if (t->lo >= limit) return 0;
    if (t->n <= limit - t->lo) return 1;
    for (i = 0; i < count; i++)
        if (symbols[i] >= limit - t->lo) return 0;
    return 1;
}

/* ---- planes ---- */

/* Where the values of a plane go: each as a byte, as some bits of one, or as the bytes that a palette has for it. */
typedef struct {
    uint8_t *out;
    size_t stride; /* bytes from one element to the next; 0 where several share one */
    unsigned bits; /* of an element, below 8, where the stride is 0 */
    const uint8_t *palette;
} plane;

static void put_bits(const plane *p, size_t i, unsigned value)
{
    unsigned each = 8 / p->bits, shift = (unsigned)(i & (each - 1)) * p->bits, mask = (1u << p->bits) - 1;
    uint8_t *byte = p->out + i / each;
    *byte = (uint8_t)((*byte & ~(mask << shift)) | (value & mask) << shift);
}

static unsigned get_bits(const plane *p, size_t i)
{
    unsigned each = 8 / p->bits;
    return (unsigned)p->out[i / each] >> ((unsigned)(i & (each - 1)) * p->bits) & ((1u << p->bits) - 1);
}

static void put_packed(const plane *p, unsigned lo, size_t start, const uint16_t *symbols, size_t count)
{
    unsigned each = 8 / p->bits, mask = (1u << p->bits) - 1, j;
    size_t i = 0;
    uint8_t *out;
    for (; i < count && (start + i) & (each - 1); i++) put_bits(p, start + i, lo + symbols[i]);
    out = p->out + (start + i) / each;
    for (; count - i >= each; i += each) {
        unsigned byte = 0;
        for (j = 0; j < each; j++) byte |= ((lo + symbols[i + j]) & mask) << j * p->bits;
        *out++ = (uint8_t)byte;
    }
    for (; i < count; i++) put_bits(p, start + i, lo + symbols[i]);
}

/* Puts `count` values, each a symbol and `lo`, from element `start` on; those of a palette are below its size. */
static void put(const plane *p, uint64_t lo, size_t start, const uint16_t *symbols, size_t count)
{
    uint8_t *out = p->stride ? p->out + start * p->stride : p->out, least = (uint8_t)(lo & 0xff);
    size_t i, j;
    if (p->palette) {
        for (i = 0; i < count; i++, out += p->stride) {
            const uint8_t *value = p->palette + (size_t)(lo + symbols[i]) * p->stride;
            for (j = 0; j < p->stride; j++) out[j] = value[j];
        }
    } else if (p->stride == 1) {
        for (i = 0; i < count; i++) out[i] = (uint8_t)(least + symbols[i]);
    } else if (p->stride) {
        for (i = 0; i < count; i++) out[i * p->stride] = (uint8_t)(least + symbols[i]);
    } else {
        put_packed(p, least, start, symbols, count);
    }
}

/* Places that wait for their symbols, all of one table. */
typedef struct {
    coder coder;
    const table *table;
    plane plane;
    uint32_t limit; /* values are below it; 0 where they wrap */
    size_t runs, waiting;
    size_t starts[RUNS], lengths[RUNS];
    uint16_t symbols[CHUNK], values[CHUNK];
    uint8_t flags[CHUNK];
} queue;

static int take_symbols(queue *q, const table *t, size_t count)
{
    return decode(&q->coder, t, q->symbols, count) && (!q->limit || are_below(t, q->symbols, count, q->limit));
}

static int flush(queue *q)
{
    size_t run, done = 0;
    if (!take_symbols(q, q->table, q->waiting)) return 0;
    for (run = 0; run < q->runs; done += q->lengths[run++])
        put(&q->plane, q->table->lo, q->starts[run], q->symbols + done, q->lengths[run]);
    q->runs = q->waiting = 0;
    return 1;
}

static int enqueue(queue *q, size_t start, size_t end)
{
    while (start < end) {
        size_t room = CHUNK - q->waiting, length = end - start < room ? end - start : room;
        q->starts[q->runs] = start;
        q->lengths[q->runs++] = length;
        q->waiting += length;
        start += length;
        if ((q->waiting == CHUNK || q->runs == RUNS) && !flush(q)) return 0;
    }
    return 1;
}

/* A map decoded: for each class the blocks of `inner` elements that are of it, ascending; they repeat after `count`. */
typedef struct {
    size_t inner, count;
    uint32_t *blocks;                /* null where there is no map: then one block is all */
    uint32_t ends[MOST_CLASSES + 1]; /* of class k: from ends[k] to ends[k + 1] */
} classes;

static fw_status read_classes(fw_bundle *b, coder *c, const map *m, classes *found)
{
    table *t = &b->tables[m->table];
    uint32_t next[MOST_CLASSES], k;
    uint16_t *class_of;
    size_t i;
    fw_status status;
    memset(found, 0, sizeof *found);
    found->inner = m->inner;
    found->count = m->count;
    found->ends[1] = 1;
    if (m->classes == 1) return FW_OK;
    if ((status = ready(b, t)) != FW_OK) return status;
    class_of = take_array(b, m->count, sizeof *class_of);
    found->blocks = take_array(b, m->count, sizeof *found->blocks);
    status = class_of && found->blocks ? FW_OK : FW_NO_MEMORY;
    if (status == FW_OK && !(decode(c, t, class_of, m->count) && are_below(t, class_of, m->count, m->classes)))
        status = FW_BAD_CODES;
    found->ends[1] = 0;
    for (i = 0; i < m->count && status == FW_OK; i++) {
        class_of[i] = (uint16_t)(class_of[i] + t->lo);
        found->ends[class_of[i] + 1]++;
    }
    for (k = 0; k < MOST_CLASSES; k++) {
        found->ends[k + 1] += found->ends[k];
        next[k] = found->ends[k];
    }
    if (status == FW_OK)
        for (i = 0; i < m->count; i++) found->blocks[next[class_of[i]]++] = (uint32_t)i;
    give(b, class_of);
    return status;
}

static size_t block(const classes *m, uint32_t at) { return m->blocks ? m->blocks[at] : 0; }

/* The elements from `start` to `end` that are of a class. */
static int walk_inner(queue *q, const classes *m, uint32_t class_, size_t start, size_t end)
{
    uint32_t first = m->ends[class_], last = m->ends[class_ + 1], low = first, high = last;
    size_t period = m->inner * m->count, base = start - start % period, from;
    from = (start - base) / m->inner;
    while (low < high) { /* the first block of the class that does not end before the start */
        uint32_t middle = low + (high - low) / 2;
        if (block(m, middle) < from) low = middle + 1;
        else high = middle;
    }
    for (;; low++) {
        size_t begin, stop;
        if (low == last) low = first, base += period;
        begin = base + block(m, low) * m->inner;
        if (begin >= end) return 1;
        stop = begin + m->inner < end ? begin + m->inner : end;
        if (!enqueue(q, begin < start ? start : begin, stop)) return 0;
    }
}

/* The elements of one context: those of a class of the map of longer blocks that are of a class of the other too. */
static int walk(queue *q, size_t n, const classes *outer, uint32_t outer_class, const classes *inner,
                uint32_t inner_class)
{
    uint32_t first = outer->ends[outer_class], last = outer->ends[outer_class + 1], at;
    size_t base = 0;
    if (first == last || inner->ends[inner_class] == inner->ends[inner_class + 1]) return 1;
    for (; base < n; base += outer->inner * outer->count)
        for (at = first; at < last; at++) {
            size_t start = base + block(outer, at) * outer->inner, end;
            if (start >= n) return 1;
            end = n - start < outer->inner ? n : start + outer->inner;
            if (!walk_inner(q, inner, inner_class, start, end)) return 0;
        }
    return 1;
}

static fw_status read_contexts(fw_bundle *b, queue *q, const coding *k, size_t n)
{
    classes found[2];
    fw_status status = FW_OK, other;
    uint32_t context, a, a_class, b_class;
    status = read_classes(b, &q->coder, &k->maps[0], &found[0]);
    other = status == FW_OK ? read_classes(b, &q->coder, &k->maps[1], &found[1]) : status;
    if (status != FW_OK) found[1].blocks = NULL;
    status = other;
    a = found[0].inner >= k->maps[1].inner ? 0 : 1; /* which map is the outer one */
    for (context = 0; context < k->maps[0].classes * k->maps[1].classes && status == FW_OK; context++) {
        table *t = &b->tables[k->contexts[context]];
        a_class = context / k->maps[1].classes, b_class = context % k->maps[1].classes;
        if ((status = ready(b, t)) != FW_OK) break;
        q->table = t;
        q->runs = q->waiting = 0;
        if (!walk(q, n, &found[a], a ? b_class : a_class, &found[1 - a], a ? a_class : b_class) || !flush(q))
            status = FW_BAD_CODES;
    }
    give(b, found[0].blocks);
    give(b, found[1].blocks);
    return status;
}

/* Replaces what stands at 2 in a split plane, 0 for its common value and 1 for another, by the values. */
static fw_status read_others(fw_bundle *b, queue *q, const coding *k, size_t n)
{
    const plane *p = &q->plane;
    table *t = &b->tables[k->others];
    size_t start, i, others, count;
    uint16_t lo = (uint16_t)(t->lo & 0xffff), common = (uint16_t)k->common;
    fw_status status = ready(b, t);
    if (status != FW_OK) return status;
    for (start = 0; start < n; start += count) {
        count = n - start < CHUNK ? n - start : CHUNK;
        for (i = others = 0; i < count; i++) {
            q->flags[i] = (uint8_t)(p->stride ? p->out[(start + i) * p->stride] : get_bits(p, start + i));
            others += q->flags[i];
        }
        if (!take_symbols(q, t, others)) return FW_BAD_CODES;
        for (i = others = 0; i < count; i++) {
            q->values[i] = q->flags[i] ? (uint16_t)(lo + q->symbols[others]) : common;
            others += q->flags[i];
        }
        put(p, 0, start, q->values, count);
    }
    return FW_OK;
}

static fw_status read_plane(fw_bundle *b, queue *q, const coding *k, const plane *p, uint32_t limit, size_t n)
{
    fw_status status;
    q->plane = *p;
    q->limit = limit;
    if (k->mode == MODE_CODED) return read_contexts(b, q, k, n);
    q->plane.palette = NULL;
    q->limit = 2;
    status = read_contexts(b, q, k, n);
    q->plane.palette = p->palette;
    q->limit = limit;
    return status == FW_OK ? read_others(b, q, k, n) : status;
}

/* ---- files ---- */

/* A word of the base as the planes have it: rotated left by one where those of the piece are. */
static void add_base(const piece *p, uint8_t *out, const uint8_t *base)
{
    size_t i, size = p->bits / 8u;
    unsigned j;
    if (p->bits < 8) {
        unsigned mask = (1u << p->bits) - 1, shift;
        for (i = 0; i < p->bytes; i++) {
            unsigned sum = 0;
            for (shift = 0; shift < 8; shift += p->bits)
                sum |= ((((unsigned)out[i] >> shift) + ((unsigned)base[i] >> shift)) & mask) << shift;
            out[i] = (uint8_t)sum;
        }
        return;
    }
    for (i = 0; i < p->n; i++, out += size, base += size) {
        unsigned carry = p->rotated ? base[size - 1] >> 7 : 0;
        for (j = 0; j < size; j++) {
            unsigned value = p->rotated ? ((unsigned)base[j] << 1 & 0xff) | carry : base[j];
            carry = base[j] >> 7;
            out[j] = (uint8_t)(out[j] + value);
        }
    }
}

static void rotate_right(const piece *p, uint8_t *out)
{
    size_t i, size = p->bits / 8u;
    unsigned j;
    for (i = 0; i < p->n; i++, out += size) {
        unsigned lowest = out[0] & 1u;
        for (j = 0; j < size; j++) {
            unsigned above = j + 1 < size ? out[j + 1] & 1u : lowest;
            out[j] = (uint8_t)(out[j] >> 1 | above << 7);
        }
    }
}

static fw_status load_base(fw_bundle *b)
{
    size_t i, size = 0, at = 0;
    fw_status status = FW_OK;
    if (!b->base) return FW_NO_BASE;
    if (b->base_bytes) return FW_OK;
    for (i = 0; i < b->base->file_count; i++)
        if (b->base->files[i].kind == FW_ARTIFACT) size += b->base->files[i].size;
    b->base_bytes = take(b, size);
    if (!b->base_bytes) return FW_NO_MEMORY;
    for (i = 0; i < b->base->file_count && status == FW_OK; i++) {
        const file *f = &b->base->files[i];
        if (f->kind != FW_ARTIFACT) continue;
        status = fw_read(b->base, i, b->base_bytes + at, f->size);
        at += f->size;
    }
    b->base_size = size;
    if (status != FW_OK) {
        give(b, b->base_bytes);
        b->base_bytes = NULL;
    }
    return status;
}

/* The base's bytes at the place of a piece. */
static fw_status find_base(fw_bundle *b, const piece *p, const uint8_t **found)
{
    size_t i, at = 0;
    fw_status status = load_base(b);
    if (status != FW_OK) return status;
    for (i = 0; i < b->base->file_count; i++) {
        const file *f = &b->base->files[i];
        if (f->kind != FW_ARTIFACT) continue;
        if (strlen(f->path) == p->base_path_size && memcmp(f->path, p->base_path, p->base_path_size) == 0) {
            if (p->bytes > f->size || p->base_at > f->size - p->bytes) return FW_BAD_BASE_PART;
            *found = b->base_bytes + at + (size_t)p->base_at;
            return FW_OK;
        }
        at += f->size;
    }
    return FW_BAD_BASE_PART;
}

static fw_status read_into(fw_bundle *b, queue *q, const piece *p, const uint8_t *raw, uint8_t *out)
{
    const uint8_t *base = NULL;
    unsigned i;
    size_t j;
    fw_status status = p->against ? find_base(b, p, &base) : FW_OK;
    for (i = 0; i < p->planes && status == FW_OK; i++) {
        plane where;
        where.out = p->n ? out + i : out;
        where.stride = p->bits / 8u;
        where.bits = p->bits;
        where.palette = p->palette;
        if (p->codings[i].mode != MODE_RAW) {
            status = read_plane(b, q, &p->codings[i], &where, p->palette ? p->colours : 0, p->n);
        } else {
            for (j = 0; j < p->n; j++) where.out[j * where.stride] = raw[j];
            if (p->n) raw += p->n;
        }
    }
    if (status != FW_OK) return status;
    if (base) add_base(p, out, base);
    if (p->rotated) rotate_right(p, out);
    return FW_OK;
}

static fw_status read_section(fw_bundle *b, uint32_t number, const uint8_t **found)
{
    section *s;
    fw_status status;
    *found = NULL;
    if (number == 0) return FW_OK;
    s = &b->sections[number - 1];
    if (s->decoded) *found = s->decoded;
    if (*found) return FW_OK;
    if (!digest_is(s->data, s->bytes, s->sha256)) return FW_BAD_SECTION_DIGEST;
    *found = s->data;
    if (s->codec == CODEC_NONE || s->codec == CODEC_RANGE) return FW_OK;
    if (s->codec == CODEC_BASE && (status = load_base(b)) != FW_OK) return status;
    s->decoded = take(b, s->size);
    if (!s->decoded) return FW_NO_MEMORY;
    if (s->codec == CODEC_LZMA) status = lz_section(b, s->data, s->bytes, s->decoded, s->size);
    else if (s->codec == CODEC_ZSTD) status = zstd_section(s->data, s->bytes, NULL, 0, s->decoded, s->size);
    else status = zstd_section(s->data, s->bytes, b->base_bytes, b->base_size, s->decoded, s->size);
    *found = s->decoded;
    if (status == FW_OK) return FW_OK;
    give(b, s->decoded);
    s->decoded = NULL;
    return status;
}

/* Drops what was decoded of a section when the last file that names it has been read. */
static void leave_section(fw_bundle *b, uint32_t number, size_t index)
{
    section *s;
    if (number == 0) return;
    s = &b->sections[number - 1];
    if (s->last > index) return;
    give(b, s->decoded);
    s->decoded = NULL;
}

static fw_status put_together(fw_bundle *b, const file *f, queue *q, uint8_t *out)
{
    const uint8_t *rest, *raw, *words;
    uint8_t *end = out + f->size;
    cursor c;
    uint64_t i;
    fw_status status;
    if ((status = read_section(b, f->rest, &rest)) != FW_OK) return status;
    if ((status = read_section(b, f->raw, &raw)) != FW_OK) return status;
    if ((status = read_section(b, f->codes, &words)) != FW_OK) return status;
    if (rest) rest += f->rest_at;
    if (raw) raw += f->raw_at;
    coder_begin(&q->coder, words, words ? b->sections[f->codes - 1].bytes : 0);
    c.at = f->pieces, c.end = b->head + b->head_size;
    for (i = 0; i < f->piece_count; i++) {
        piece p;
        if ((status = read_piece(&c, b, (size_t)(end - out), &p)) != FW_OK) return status;
        if (p.gap) {
            memcpy(out, rest, p.gap);
            rest += p.gap;
            out += p.gap;
        }
        if ((status = read_into(b, q, &p, raw, out)) != FW_OK) return status;
        if (p.raw) raw += p.raw;
        out += p.bytes;
    }
    if (out < end) memcpy(out, rest, (size_t)(end - out));
    /* All words are read, and what is ahead is as little as an encoder leaves; or nothing was coded. */
    if (q->coder.at != q->coder.end) return FW_BAD_CODES;
    return q->coder.range != UINT64_MAX && q->coder.ahead >= MOST_AHEAD ? FW_BAD_CODES : FW_OK;
}

fw_status fw_read(fw_bundle *b, size_t index, uint8_t *out, size_t size)
{
    const file *f;
    queue *q;
    size_t same;
    uint8_t none;
    fw_status status;
    if (!b || (!out && size)) return FW_BAD_CALL;
    if (index >= b->file_count) return FW_NO_FILE;
    same = b->files[index].same;
    f = &b->files[same];
    if (size != f->size) return FW_BAD_CALL;
    if (!out) out = &none;
    q = take(b, sizeof *q);
    if (!q) return FW_NO_MEMORY;
    status = put_together(b, f, q, out);
    give(b, q);
    leave_section(b, f->rest, same);
    leave_section(b, f->raw, same);
    if (status == FW_OK && !digest_is(out, size, f->sha256)) status = FW_BAD_FILE_DIGEST;
    if (status != FW_OK && size) memset(out, 0, size);
    return status;
}

/* ---- opening, closing, asking ---- */

static fw_status open_head(fw_bundle *b, const uint8_t *data, size_t size)
{
    static const uint8_t magic[8] = {0x89, 'F', 'W', 'B', '\r', '\n', 0x1a, '\n'};
    uint64_t head, decoded, body;
    unsigned codec;
    fw_status status = FW_OK;
    if (size < sizeof magic || memcmp(data, magic, sizeof magic) != 0) return FW_NO_BUNDLE;
    if (size < PREFIX) return FW_TRUNCATED;
    if (read_fixed(data + 8, 2) != 1) return FW_NEWER;
    codec = data[10];
    head = read_fixed(data + 12, 4), decoded = read_fixed(data + 16, 4), body = read_fixed(data + 24, 8);
    if (data[11] || read_fixed(data + 20, 4)) return FW_BAD_PREFIX;
    if (codec > CODEC_LZMA) return FW_NEWER;
    if (decoded > b->limits.max_head) return FW_HEAD_TOO_LARGE;
    if (head > size - PREFIX || body > size - PREFIX - head) return FW_TRUNCATED;
    if (size - PREFIX - head - body > MOST_SIGNATURE) return FW_BAD_PREFIX;
    if (!digest_is(data + PREFIX, (size_t)head, data + 32)) return FW_BAD_HEAD_DIGEST;
    b->head = data + PREFIX;
    b->head_size = (size_t)decoded;
    if (codec == CODEC_NONE) {
        if (head != decoded) return FW_BAD_HEAD;
    } else {
        b->head_memory = take(b, b->head_size);
        if (!b->head_memory) return FW_NO_MEMORY;
        if (codec == CODEC_ZSTD) status = zstd_section(b->head, (size_t)head, NULL, 0, b->head_memory, b->head_size);
        else status = lz_section(b, b->head, (size_t)head, b->head_memory, b->head_size);
        b->head = b->head_memory;
    }
    if (status != FW_OK) return status == FW_BAD_SECTION ? FW_BAD_HEAD : status;
    sha256(data, PREFIX + (size_t)head, b->identity);
    return read_head(b, data + PREFIX + head, (size_t)body);
}

fw_status fw_open(const uint8_t *data, size_t size, const fw_limits *limits, fw_bundle **bundle)
{
    fw_limits used;
    fw_bundle *b, first;
    fw_status status;
    if (!bundle) return FW_BAD_CALL;
    *bundle = NULL;
    memset(&used, 0, sizeof used);
    if (limits) used = *limits;
    if (!data || !used.allocate != !used.release) return FW_BAD_CALL;
    if (used.max_bytes == 0) used.max_bytes = MOST_BYTES;
    if (used.max_bytes > SIZE_MAX / 4) used.max_bytes = SIZE_MAX / 4; /* so that no sum overflows */
    if (used.max_head == 0 || used.max_head > MOST_HEAD) used.max_head = MOST_HEAD;
    first.limits = used;
    b = take_array(&first, 1, sizeof *b);
    if (!b) return FW_NO_MEMORY;
    b->limits = used;
    status = open_head(b, data, size);
    if (status == FW_OK) *bundle = b;
    else fw_close(b);
    return status;
}

void fw_close(fw_bundle *b)
{
    size_t i;
    fw_bundle last;
    if (!b) return;
    for (i = 0; i < b->table_count; i++) {
        give(b, b->tables[i].left);
        give(b, b->tables[i].bucket);
    }
    for (i = 0; i < b->section_count; i++) give(b, b->sections[i].decoded);
    give(b, b->tables);
    give(b, b->sections);
    give(b, b->files);
    give(b, b->paths);
    give(b, b->base_bytes);
    give(b, b->head_memory);
    last.limits = b->limits;
    give(&last, b);
}

const uint8_t *fw_identity(const fw_bundle *b) { return b->identity; }

const uint8_t *fw_base_identity(const fw_bundle *b) { return b->base_identity; }

fw_status fw_set_base(fw_bundle *b, fw_bundle *base)
{
    if (!b || !base || !b->base_identity) return FW_BAD_CALL;
    if (memcmp(b->base_identity, base->identity, DIGEST) != 0) return FW_OTHER_BASE;
    b->base = base;
    return FW_OK;
}

size_t fw_count(const fw_bundle *b) { return b->file_count; }

fw_status fw_file_at(const fw_bundle *b, size_t index, fw_file *found)
{
    if (!b || !found) return FW_BAD_CALL;
    if (index >= b->file_count) return FW_NO_FILE;
    found->path = b->files[index].path;
    found->kind = b->files[index].kind;
    found->size = b->files[index].size;
    found->sha256 = b->files[index].sha256;
    return FW_OK;
}

size_t fw_find(const fw_bundle *b, const char *path)
{
    size_t i;
    for (i = 0; i < b->file_count && strcmp(b->files[i].path, path) != 0; i++) continue;
    return i;
}

const char *fw_error_text(fw_status status)
{
    switch (status) {
    case FW_OK: return "all is well";
    case FW_BAD_CALL: return "the reader was called with a null pointer or a wrong size";
    case FW_NO_FILE: return "it holds no such file";
    case FW_NO_MEMORY: return "there is not enough memory";
    case FW_TOO_LARGE: return "it declares more bytes than are allowed";
    case FW_HEAD_TOO_LARGE: return "its head declares more bytes than are allowed";
    case FW_NO_BUNDLE: return "this is no .fw bundle: it does not begin like one";
    case FW_NEWER: return "it is of a later version of the format, update the reader";
    case FW_TRUNCATED: return "the file ends too early, fetch it again";
    case FW_BAD_PREFIX: return "its first 64 bytes are against the format";
    case FW_BAD_HEAD_DIGEST: return "the head has another SHA-256 than declared, fetch the file again";
    case FW_BAD_HEAD: return "the head is against the format";
    case FW_BAD_PATH: return "a path is unsafe, or two paths collide";
    case FW_BAD_TABLE: return "a table has no frequencies";
    case FW_BAD_SECTIONS: return "its sections, files and body do not add up";
    case FW_BAD_PIECE: return "a piece of a file is against the format";
    case FW_BAD_SECTION_DIGEST: return "a section has another SHA-256 than declared, fetch the file again";
    case FW_BAD_SECTION: return "a section does not decode to what it declares";
    case FW_BAD_CODES: return "its codes are damaged";
    case FW_BAD_FILE_DIGEST: return "a file has another SHA-256 than declared";
    case FW_NO_BASE: return "it is an update, give the bundle that it was made from as its base";
    case FW_OTHER_BASE: return "the base is not the bundle that the update was made from";
    case FW_BAD_BASE_PART: return "the base holds no such artifact file, or a shorter one";
    }
    return "an unknown error";
}
