/* SPDX-License-Identifier: MIT
 *
 * Guest RAM in this process.
 */
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include "error.h"
#include "pyhv.h"

static int check_size(uint64_t offset, uint64_t size, const char *what, struct pyhv_error *error)
{
    if (size == 0 || size % PYHV_PAGE_SIZE != 0 || offset % PYHV_PAGE_SIZE != 0 || size > INT64_MAX - offset)
        return pyhv_fail(error, EINVAL, what, "0x%llx bytes at 0x%llx", (unsigned long long)size,
                         (unsigned long long)offset);
    return 0;
}

int pyhv_memory_create(struct pyhv_memory *memory, uint64_t size, struct pyhv_error *error)
{
    *memory = (struct pyhv_memory){.fd = -1};
    if (check_size(0, size, "pyhv_memory_create", error) < 0)
        return -1;
    int fd = memfd_create("pyhv-ram", MFD_CLOEXEC);
    if (fd < 0)
        return pyhv_fail_errno(error, "memfd_create");
    void *host = MAP_FAILED;
    const char *what = "ftruncate";
    if (ftruncate(fd, (off_t)size) == 0) {
        what = "mmap";
        host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    }
    if (host == MAP_FAILED) {
        pyhv_fail(error, errno, what, "guest memory of 0x%llx bytes", (unsigned long long)size);
        close(fd);
        return -1;
    }
    *memory = (struct pyhv_memory){.host = host, .size = size, .fd = fd};
    return 0;
}

int pyhv_memory_create_anonymous(struct pyhv_memory *memory, uint64_t size, struct pyhv_error *error)
{
    const uint64_t huge = UINT64_C(2) << 20;
    *memory = (struct pyhv_memory){.fd = -1};
    if (check_size(0, size, "pyhv_memory_create_anonymous", error) < 0)
        return -1;
    int fd = memfd_create("pyhv-no-content", MFD_CLOEXEC);
    if (fd < 0)
        return pyhv_fail_errno(error, "memfd_create");
    uint8_t *room = MAP_FAILED;
    const char *what = "ftruncate";
    if (ftruncate(fd, (off_t)size) == 0) {
        what = "mmap";
        room = mmap(NULL, size + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }
    if (room == MAP_FAILED) {
        pyhv_fail(error, errno, what, "guest memory of 0x%llx bytes", (unsigned long long)size);
        close(fd);
        return -1;
    }
    /* A huge page begins at a multiple of its size, here and in the guest's physical memory. */
    uint8_t *host = (uint8_t *)(((uintptr_t)room + huge - 1) & ~(uintptr_t)(huge - 1));
    if (host > room)
        munmap(room, (size_t)(host - room));
    if (host < room + huge)
        munmap(host + size, (size_t)(room + huge - host));
    (void)madvise(host, size, MADV_HUGEPAGE); /* refused by a kernel without them: then they are small */
    *memory = (struct pyhv_memory){.host = host, .size = size, .fd = fd, .of_a_file = 1, .anonymous = 1};
    return 0;
}

int pyhv_memory_map_file(struct pyhv_memory *memory, int fd, uint64_t offset, uint64_t size, struct pyhv_error *error)
{
    *memory = (struct pyhv_memory){.fd = -1};
    if (check_size(offset, size, "pyhv_memory_map_file", error) < 0)
        return -1;
    int own = fcntl(fd, F_DUPFD_CLOEXEC, 0);
    if (own < 0)
        return pyhv_fail_errno(error, "fcntl");
    void *host = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_NORESERVE, own, (off_t)offset);
    if (host == MAP_FAILED) {
        pyhv_fail(error, errno, "mmap", "guest memory of 0x%llx bytes", (unsigned long long)size);
        close(own);
        return -1;
    }
    *memory = (struct pyhv_memory){.host = host, .size = size, .offset = offset, .fd = own, .of_a_file = 1};
    return 0;
}

void pyhv_memory_destroy(struct pyhv_memory *memory)
{
    if (memory->fd < 0)
        return;
    munmap(memory->host, memory->size);
    close(memory->fd);
    *memory = (struct pyhv_memory){.fd = -1};
}

/* The kernel copies between two places of this process: for it a page that cannot be had is EFAULT, no signal. */
static int copy(void *local, const uint8_t *guest, size_t size, int is_write, struct pyhv_error *error)
{
    struct iovec here = {local, size}, there = {(void *)(uintptr_t)guest, size};
    size_t done = 0;
    while (done < size) {
        here = (struct iovec){(uint8_t *)local + done, size - done};
        there = (struct iovec){(uint8_t *)(uintptr_t)guest + done, size - done};
        ssize_t part = is_write ? process_vm_writev(getpid(), &here, 1, &there, 1, 0)
                                : process_vm_readv(getpid(), &here, 1, &there, 1, 0);
        if (part < 0 && (errno == EPERM || errno == ENOSYS)) {
            /* A sandbox that forbids the call: then a file that is cut short is a SIGBUS after all. */
            memcpy(is_write ? there.iov_base : here.iov_base, is_write ? here.iov_base : there.iov_base, size - done);
            return 0;
        }
        if (part <= 0)
            return pyhv_fail(error, part < 0 ? errno : EFAULT,
                             is_write ? "writing guest memory" : "reading guest memory",
                             "is the file behind it shorter than it was?");
        done += (size_t)part;
    }
    return 0;
}

int pyhv_memory_read(const uint8_t *host, void *buffer, size_t size, struct pyhv_error *error)
{
    return copy(buffer, host, size, 0, error);
}

int pyhv_memory_write(uint8_t *host, const void *buffer, size_t size, struct pyhv_error *error)
{
    return copy((void *)(uintptr_t)buffer, host, size, 1, error);
}
