/* SPDX-License-Identifier: MIT
 *
 * Compressing pages; see zstd.h.
 */
#include "migration/zstd.h"

#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

/* The functions of libzstd that have been stable since 1.0 (zstd.h, "Simple API", "Explicit context"). */
static struct {
    void *handle; /* dlopen(3)'s; NULL: not opened, or not there */
    char reason[160];
    void *(*create_cctx)(void);
    size_t (*free_cctx)(void *);
    size_t (*compress)(void *, void *, size_t, const void *, size_t, int);
    void *(*create_dctx)(void);
    size_t (*free_dctx)(void *);
    size_t (*decompress)(void *, void *, size_t, const void *, size_t);
    unsigned (*is_error)(size_t);
    const char *(*error_name)(size_t);
} zstd;

static void open_library(void)
{
    static const struct {
        const char *name;
        void *place;
    } functions[] = {
        {"ZSTD_createCCtx", &zstd.create_cctx}, {"ZSTD_freeCCtx", &zstd.free_cctx},
        {"ZSTD_compressCCtx", &zstd.compress},  {"ZSTD_createDCtx", &zstd.create_dctx},
        {"ZSTD_freeDCtx", &zstd.free_dctx},     {"ZSTD_decompressDCtx", &zstd.decompress},
        {"ZSTD_isError", &zstd.is_error},       {"ZSTD_getErrorName", &zstd.error_name},
    };
    void *library = dlopen("libzstd.so.1", RTLD_NOW | RTLD_LOCAL);
    for (size_t i = 0; library && i < sizeof functions / sizeof functions[0]; i++) {
        void *function = dlsym(library, functions[i].name);
        if (!function) {
            dlclose(library);
            library = NULL;
            break;
        }
        memcpy(functions[i].place, &function, sizeof function);
    }
    if (!library) {
        const char *reason = dlerror();
        strncpy(zstd.reason, reason ? reason : "libzstd.so.1", sizeof zstd.reason - 1);
    }
    zstd.handle = library;
}

int pyhv_zstd_open(struct pyhv_error *error)
{
    static pthread_once_t once = PTHREAD_ONCE_INIT;
    pthread_once(&once, open_library);
    return zstd.handle ? 0 : pyhv_fail(error, 0, "libzstd", "%s", zstd.reason);
}

struct link_zstd {
    void *compressor, *decompressor;
    uint8_t *buffer;
    size_t size;
};

struct link_zstd *link_zstd_create(size_t size, struct pyhv_error *error)
{
    if (pyhv_zstd_open(error) < 0)
        return NULL;
    struct link_zstd *own = calloc(1, sizeof *own);
    if (own) {
        own->compressor = zstd.create_cctx();
        own->decompressor = zstd.create_dctx();
        own->buffer = malloc(size);
        own->size = size;
    }
    if (!own || !own->compressor || !own->decompressor || !own->buffer) {
        link_zstd_destroy(own);
        pyhv_fail(error, ENOMEM, "libzstd", NULL);
        return NULL;
    }
    return own;
}

void link_zstd_destroy(struct link_zstd *own)
{
    if (!own)
        return;
    zstd.free_cctx(own->compressor); /* these accept NULL, as free does */
    zstd.free_dctx(own->decompressor);
    free(own->buffer);
    free(own);
}

uint8_t *link_zstd_buffer(struct link_zstd *own)
{
    return own->buffer;
}

size_t link_compress(struct link_zstd *own, const void *data, size_t size, int level)
{
    /* Room for less than what goes in: then a payload that does not shrink is an error here. */
    size_t length = zstd.compress(own->compressor, own->buffer, size - 1, data, size, level);
    return zstd.is_error(length) ? 0 : length;
}

int64_t link_decompress(struct link_zstd *own, const void *data, size_t size, struct pyhv_error *error)
{
    size_t length = zstd.decompress(own->decompressor, own->buffer, own->size, data, size);
    if (zstd.is_error(length))
        return pyhv_fail(error, EBADMSG, "link", "compressed pages: %s", zstd.error_name(length));
    return (int64_t)length;
}
