/* Reads .fw bundles: one file that holds a network's artifact, entropy-coded, and its documents.
 *
 * The format is docs/fw-format.md. fw.c needs C99, libc and libzstd, and nothing else; see README.md for
 * how to compile it and for an example. Nothing is read but the bytes that are handed over, and nothing
 * is written but the caller's buffers. One bundle belongs to one thread at a time.
 */
#ifndef FEATHERWEIGHT_FW_H
#define FEATHERWEIGHT_FW_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Why something did not work; fw_error_text() says it in words. */
typedef enum {
    FW_OK = 0,
    FW_BAD_CALL,       /* a null pointer, a buffer of another size */
    FW_NO_FILE,        /* no file has this index */
    FW_NO_MEMORY,      /* an allocation failed */
    FW_TOO_LARGE,      /* the files or the sections declare more bytes than max_bytes */
    FW_HEAD_TOO_LARGE, /* the head declares more bytes than max_head */
    FW_NO_BUNDLE,      /* the first eight bytes are not those of a bundle */
    FW_NEWER,          /* a version or a codec that this reader does not know */
    FW_TRUNCATED,      /* the file ends before its head or its body does */
    FW_BAD_PREFIX,     /* a byte of the first 64 that has to be 0 is not */
    FW_BAD_HEAD_DIGEST,
    FW_BAD_HEAD,      /* the head is against the format */
    FW_BAD_PATH,      /* a path that leaves the folder, that some system cannot store, or that clashes */
    FW_BAD_TABLE,     /* the frequencies of a table sum to 0 */
    FW_BAD_SECTIONS,  /* sections and files do not add up */
    FW_BAD_PIECE,     /* a piece of a file is against the format, or larger than its file */
    FW_BAD_SECTION_DIGEST,
    FW_BAD_SECTION,   /* a section does not decode to the size that it declares */
    FW_BAD_CODES,     /* the words of the range coder are none that an encoder writes */
    FW_BAD_FILE_DIGEST,
    FW_NO_BASE,       /* an update: it needs fw_set_base() */
    FW_OTHER_BASE,    /* the base is not the bundle that the update was made from */
    FW_BAD_BASE_PART  /* the base has no such artifact file, or it is shorter */
} fw_status;

/* What a reader may spend. Zero stands for the default, also of a null pointer to all of it. */
typedef struct {
    uint64_t max_bytes; /* of all files together, and of all sections decoded; 4 GiB */
    uint64_t max_head;  /* of the head decoded; 64 MiB, and never more */
    /* Instead of malloc and free, both or none. libzstd has its own context of some 100 KiB. */
    void *(*allocate)(void *user, size_t bytes);
    void (*release)(void *user, void *pointer);
    void *user;
} fw_limits;

typedef enum { FW_ARTIFACT = 0, FW_DOCUMENT = 1, FW_PROBE = 2 } fw_kind;

typedef struct {
    const char *path; /* UTF-8, relative, '/' between names, safe to create on every system */
    fw_kind kind;
    uint64_t size;         /* fits a size_t */
    const uint8_t *sha256; /* 32 bytes */
} fw_file;

typedef struct fw_bundle fw_bundle;

/* Opens a bundle that lies in memory. The bytes have to stay until fw_close(). The head is read and held against the
 * format and the limits; sections are read by fw_read(). Where it fails, *bundle is null. */
fw_status fw_open(const uint8_t *data, size_t size, const fw_limits *limits, fw_bundle **bundle);
void fw_close(fw_bundle *bundle); /* null is fine */

/* The SHA-256 of prefix and head, 32 bytes: what a signature signs and an update names. */
const uint8_t *fw_identity(const fw_bundle *bundle);
/* The identity of the bundle that this one is an update of; null where it stands alone. */
const uint8_t *fw_base_identity(const fw_bundle *bundle);
/* Gives an update its base, which has to stay open as long. A base that is an update needs its own first. */
fw_status fw_set_base(fw_bundle *bundle, fw_bundle *base);

/* The files, in the order of the head. */
size_t fw_count(const fw_bundle *bundle);
fw_status fw_file_at(const fw_bundle *bundle, size_t index, fw_file *file);
/* The index of a path, written as in the bundle; fw_count() where there is none. */
size_t fw_find(const fw_bundle *bundle, const char *path);

/* Decodes one file into out, which is as large as the file. FW_OK only where its SHA-256 is right; else out holds
 * zeros. Read the files in order where memory is short: a section that several share is kept until the last of them. */
fw_status fw_read(fw_bundle *bundle, size_t index, uint8_t *out, size_t size);

/* One sentence without a full stop, in English; never null. */
const char *fw_error_text(fw_status status);

#ifdef __cplusplus
}
#endif

#endif
