/* fw: lists, checks and unpacks .fw bundles from a shell, by fw.h.
 *
 *     fw list FILE
 *     fw check FILE... [--base OLD] [--max-bytes N]
 *     fw unpack FILE FOLDER [--base OLD] [--max-bytes N]
 *
 * An update of an update takes one --base for each, the newest first. The exit code is 0, or 2 after one line on stderr
 * for each file that was refused. `unpack` writes into a folder of its own beside FOLDER and renames it when all is
 * there; FOLDER is new, or empty.
 */
#define _POSIX_C_SOURCE 200809L

#include "fw.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { REFUSED = 2, MOST_BASES = 16, MOST_PATH = 4096 };

typedef struct {
    const char *name;
    uint8_t *data;
    fw_bundle *bundle;
} opened;

typedef struct {
    const char *bases[MOST_BASES];
    int base_count;
    fw_limits limits;
} options;

/* One line on stderr; `where` is a file of the bundle, or null. */
static int refuse(const char *name, const char *where, const char *why)
{
    if (where) fprintf(stderr, "fw: %s: %s: %s\n", name, where, why);
    else fprintf(stderr, "fw: %s: %s\n", name, why);
    return REFUSED;
}

static int read_all(FILE *stream, uint8_t **data, size_t *size)
{
    size_t room = 0;
    *data = NULL;
    *size = 0;
    for (;;) {
        uint8_t *larger;
        if (*size == room) {
            room = room ? room * 2 : (size_t)1 << 16;
            larger = room > SIZE_MAX / 4 ? NULL : realloc(*data, room);
            if (!larger) return ENOMEM;
            *data = larger;
        }
        errno = 0;
        *size += fread(*data + *size, 1, room - *size, stream);
        if (ferror(stream)) return errno ? errno : EIO;
        if (feof(stream)) return 0;
    }
}

static void close_one(opened *file)
{
    fw_close(file->bundle);
    free(file->data);
    file->bundle = NULL;
    file->data = NULL;
}

static int open_one(opened *file, const char *name, const fw_limits *limits)
{
    FILE *stream = fopen(name, "rb");
    size_t size;
    int failure;
    fw_status status;
    file->name = name;
    file->data = NULL;
    file->bundle = NULL;
    if (!stream) return refuse(name, NULL, strerror(errno));
    failure = read_all(stream, &file->data, &size);
    fclose(stream);
    status = failure ? FW_OK : fw_open(file->data, size, limits, &file->bundle);
    if (!failure && status == FW_OK) return 0;
    close_one(file);
    return refuse(name, NULL, failure ? strerror(failure) : fw_error_text(status));
}

/* Opens the bases and hands each to the one before it. How many were opened is in *count, also where one fails. */
static int open_bases(const options *told, opened *bases, int *count)
{
    for (*count = 0; *count < told->base_count; ++*count) {
        fw_status status = FW_OK;
        int i = *count;
        if (open_one(&bases[i], told->bases[i], &told->limits)) return REFUSED;
        if (i > 0) status = fw_set_base(bases[i - 1].bundle, bases[i].bundle);
        if (status != FW_OK) {
            ++*count;
            if (status == FW_BAD_CALL) return refuse(bases[i].name, NULL, "its update stands alone");
            return refuse(bases[i].name, NULL, fw_error_text(status));
        }
    }
    return 0;
}

static int set_base(opened *file, opened *bases, int count)
{
    fw_status status;
    if (count == 0 || !fw_base_identity(file->bundle)) return 0;
    status = fw_set_base(file->bundle, bases[0].bundle);
    return status == FW_OK ? 0 : refuse(file->name, NULL, fw_error_text(status));
}

static int list(const opened *file)
{
    static const char *const kinds[] = {"artifact", "document", "probe"};
    size_t i;
    fw_file found;
    for (i = 0; i < fw_count(file->bundle); i++) {
        fw_file_at(file->bundle, i, &found);
        printf("%" PRIu64 "\t%s\t%s\n", found.size, kinds[found.kind], found.path);
    }
    return 0;
}

/* Decodes a file of a bundle into memory that the caller frees. */
static int decode(const opened *file, size_t index, fw_file *found, uint8_t **data)
{
    fw_status status;
    fw_file_at(file->bundle, index, found);
    *data = malloc(found->size ? (size_t)found->size : 1);
    status = *data ? fw_read(file->bundle, index, *data, (size_t)found->size) : FW_NO_MEMORY;
    if (status == FW_OK) return 0;
    free(*data);
    return refuse(file->name, found->path, fw_error_text(status));
}

static int check(const opened *file)
{
    size_t i;
    fw_file found;
    uint8_t *data;
    for (i = 0; i < fw_count(file->bundle); i++) {
        if (decode(file, i, &found, &data)) return REFUSED;
        free(data);
    }
    printf("%s: whole, %zu files\n", file->name, fw_count(file->bundle));
    return 0;
}

/* ---- unpack ---- */

/* folder/name; too long a path is one that no system would open anyway. */
static int join(char path[MOST_PATH], const char *folder, const char *name)
{
    int length = snprintf(path, MOST_PATH, "%s/%s", folder, name);
    if (length > 0 && length < MOST_PATH) return 1;
    errno = ENAMETOOLONG;
    return 0;
}

static int make_folders(char *path, size_t from)
{
    char *slash;
    for (slash = strchr(path + from, '/'); slash; slash = strchr(slash + 1, '/')) {
        int failed;
        *slash = '\0';
        failed = mkdir(path, 0777) != 0 && errno != EEXIST;
        *slash = '/';
        if (failed) return 0;
    }
    return 1;
}

/* A new file, never one that is there and never through a link. */
static int write_file(const char *path, const uint8_t *data, size_t size)
{
    int handle = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0666);
    FILE *stream = handle < 0 ? NULL : fdopen(handle, "wb");
    int fine;
    if (!stream) {
        if (handle >= 0) close(handle);
        return 0;
    }
    fine = fwrite(data, 1, size, stream) == size;
    return fclose(stream) == 0 && fine;
}

static int write_all(const opened *file, const char *folder)
{
    char path[MOST_PATH];
    size_t i, length = strlen(folder) + 1;
    fw_file found;
    uint8_t *data;
    for (i = 0; i < fw_count(file->bundle); i++) {
        int fine;
        if (decode(file, i, &found, &data)) return REFUSED;
        fine = join(path, folder, found.path) && make_folders(path, length)
               && write_file(path, data, (size_t)found.size);
        free(data);
        if (!fine) return refuse(file->name, found.path, strerror(errno));
    }
    return 0;
}

/* Takes away what write_all has made of it, and nothing else. */
static void remove_all(const opened *file, const char *folder)
{
    char path[MOST_PATH], *slash;
    size_t i, length = strlen(folder) + 1;
    fw_file found;
    for (i = 0; i < fw_count(file->bundle); i++) {
        fw_file_at(file->bundle, i, &found);
        if (join(path, folder, found.path)) unlink(path);
    }
    for (i = 0; i < fw_count(file->bundle); i++) {
        fw_file_at(file->bundle, i, &found);
        if (!join(path, folder, found.path)) continue;
        while ((slash = strrchr(path + length, '/')) != NULL) {
            *slash = '\0';
            rmdir(path); /* fails while another file's folders are in it; its turn comes */
        }
    }
    rmdir(folder);
}

static int is_new_or_empty(const char *folder)
{
    struct stat there;
    struct dirent *entry;
    DIR *opened_folder;
    int empty = 1;
    if (lstat(folder, &there) != 0) return errno == ENOENT;
    if (!S_ISDIR(there.st_mode)) return 0;
    opened_folder = opendir(folder);
    if (!opened_folder) return 0;
    while ((entry = readdir(opened_folder)) != NULL)
        if (strcmp(entry->d_name, ".") != 0 && strcmp(entry->d_name, "..") != 0) empty = 0;
    closedir(opened_folder);
    return empty;
}

static int unpack(const opened *file, const char *told)
{
    char folder[MOST_PATH], beside[MOST_PATH];
    size_t length = strlen(told);
    int code, made;
    while (length > 1 && told[length - 1] == '/') length--;
    if (length == 0 || length >= MOST_PATH) return refuse(told, NULL, "this is no name for a folder");
    memcpy(folder, told, length);
    folder[length] = '\0';
    if (!is_new_or_empty(folder)) return refuse(folder, NULL, "it is there already, name a new folder or an empty one");
    made = snprintf(beside, sizeof beside, "%s.unpacking-%ld", folder, (long)getpid());
    if (made < 0 || made >= MOST_PATH) return refuse(folder, NULL, strerror(ENAMETOOLONG));
    if (mkdir(beside, 0777) != 0) return refuse(beside, NULL, strerror(errno));
    code = write_all(file, beside);
    if (code == 0 && rename(beside, folder) != 0) code = refuse(folder, NULL, strerror(errno));
    if (code) remove_all(file, beside);
    return code;
}

/* ---- the command line ---- */

static int usage(void)
{
    fprintf(stderr, "fw: use: fw list FILE | fw check FILE... | fw unpack FILE FOLDER  [--base OLD] [--max-bytes N]\n");
    return REFUSED;
}

/* Sorts the options out of the arguments; what is left stands at their front. Its count, or -1. */
static int take_options(int count, char **arguments, options *told)
{
    int left = 0, i;
    char *end;
    memset(told, 0, sizeof *told);
    for (i = 0; i < count; i++) {
        if (strncmp(arguments[i], "--", 2) != 0) {
            arguments[left++] = arguments[i];
        } else if (strcmp(arguments[i], "--base") == 0 && i + 1 < count && told->base_count < MOST_BASES) {
            told->bases[told->base_count++] = arguments[++i];
        } else if (strcmp(arguments[i], "--max-bytes") == 0 && i + 1 < count) {
            errno = 0;
            told->limits.max_bytes = strtoull(arguments[++i], &end, 10);
            if (arguments[i][0] < '0' || arguments[i][0] > '9' || *end || errno || !told->limits.max_bytes) return -1;
        } else {
            return -1;
        }
    }
    return left;
}

static int run_one(const char *command, char **names, opened *bases, int base_count, const options *told)
{
    opened file;
    int code = open_one(&file, names[0], &told->limits);
    if (code) return code;
    code = set_base(&file, bases, base_count);
    if (code == 0) {
        if (strcmp(command, "list") == 0) code = list(&file);
        else if (strcmp(command, "check") == 0) code = check(&file);
        else code = unpack(&file, names[1]);
    }
    close_one(&file);
    return code;
}

static int run(const char *command, char **names, int count, const options *told)
{
    opened bases[MOST_BASES];
    int base_count, i, code = open_bases(told, bases, &base_count);
    if (code == 0 && strcmp(command, "check") != 0) {
        code = run_one(command, names, bases, base_count, told);
    } else if (code == 0) {
        for (i = 0; i < count; i++)
            if (run_one(command, names + i, bases, base_count, told)) code = REFUSED;
    }
    for (i = 0; i < base_count; i++) close_one(&bases[i]);
    if (fflush(stdout) != 0 && code == 0) code = refuse("stdout", NULL, strerror(errno));
    return code;
}

int main(int count, char **arguments)
{
    options told;
    int left;
    if (count < 3) return usage();
    left = take_options(count - 2, arguments + 2, &told);
    if (strcmp(arguments[1], "check") == 0 ? left < 1 : strcmp(arguments[1], "unpack") == 0 ? left != 2
                                                      : strcmp(arguments[1], "list") != 0 || left != 1)
        return usage();
    return run(arguments[1], arguments + 2, left, &told);
}
