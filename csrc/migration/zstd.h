/* SPDX-License-Identifier: MIT
 *
 * Compressing pages with libzstd, which is opened at run time.
 */
#ifndef PYHV_MIGRATION_ZSTD_H
#define PYHV_MIGRATION_ZSTD_H

#include "error.h"
#include "pyhv.h"

struct link_zstd; /* what one link needs of it, with a buffer of so many bytes: */

struct link_zstd *link_zstd_create(size_t size, struct pyhv_error *error);
void link_zstd_destroy(struct link_zstd *zstd);

/* What was last compressed or decompressed. */
uint8_t *link_zstd_buffer(struct link_zstd *zstd);

/* Both return the bytes in the buffer. 0: it does not shrink; -1: what came is no frame, or has more. */
size_t link_compress(struct link_zstd *zstd, const void *data, size_t size, int level);
int64_t link_decompress(struct link_zstd *zstd, const void *data, size_t size, struct pyhv_error *error);

#endif
