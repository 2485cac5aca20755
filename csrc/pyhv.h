/* SPDX-License-Identifier: MIT
 *
 * The C engine of pyhv: everything that Python sees of it.
 *
 * The cffi build script reads this file too (its preprocessor lines removed), so it holds plain C declarations
 * and integer constants, and no macros with arguments.
 *
 * Conventions
 *  - A function that can fail takes a struct pyhv_error last, returns -1 or NULL and fills it; else 0 or a pointer.
 *  - Addresses of guest memory are guest-physical (gpa, bytes) unless a name says linear.
 *  - What *_create() returns belongs to the caller, who gives it to *_destroy() once; NULL is accepted there.
 *  - Unless a comment says otherwise an object is used by one thread at a time.
 */
#ifndef PYHV_H
#define PYHV_H

#include <stddef.h>
#include <stdint.h>

/* ------------------------------------------------------------------------------------------------ errors -- */

/* What failed: `what` names the call or the check ("KVM_CREATE_VM", "mmap", "uart16550: load"), `errnum` is an
 * errno value or 0 where no system call was involved, `detail` adds what was found, in words, or is empty. */
struct pyhv_error {
    int32_t errnum;
    char what[48];
    char detail[176];
};

/* ------------------------------------------------------------------------------------------------- CPUID -- */

/* KVM takes no more entries than this (KVM_MAX_CPUID_ENTRIES, arch/x86/include/asm/kvm_host.h). */
#define PYHV_CPUID_MAX_ENTRIES 256

/* Leaves of the basic and of the extended range that are found without a search; processors have about 36. */
#define PYHV_CPUID_PLACES 64

/* One CPUID answer. `indexed` is 1 where ECX selects the answer, 0 where the leaf ignores ECX (then subleaf = 0). */
struct pyhv_cpuid_entry {
    uint32_t leaf;
    uint32_t subleaf;
    uint32_t indexed;
    uint32_t eax;
    uint32_t ebx;
    uint32_t ecx;
    uint32_t edx;
};

/* What one vCPU's CPUID instruction answers. Make one with pyhv_cpuid_table_init(), which sorts and checks;
 * read-only from then on, so any number of threads may share it. */
struct pyhv_cpuid_table {
    uint32_t count;
    uint32_t max_basic;     /* leaf 0 EAX */
    uint32_t max_extended;  /* leaf 0x80000000 EAX, 0 where that leaf is absent */
    uint32_t repeats_basic; /* 1: an out-of-range leaf answers as the highest basic leaf (Intel); 0: zeros (AMD) */
    struct pyhv_cpuid_entry entries[PYHV_CPUID_MAX_ENTRIES];
    /* Where the leaves of the basic and of the extended range are: the place of the entry nearest to (leaf, 0), and of
     * the leaf's last one. */
    struct pyhv_cpuid_place {
        uint8_t first, last;
    } places[2][PYHV_CPUID_PLACES];
};

/* The state of a vCPU that CPUID's answer depends on beyond the table. */
struct pyhv_cpuid_dynamic {
    uint64_t cr4;       /* OSXSAVE and PKE are reflected in leaf 1 ECX and leaf 7 ECX */
    uint64_t xcr0;      /* leaf 0xD subleaf 0 EBX: size of the enabled components */
    uint64_t xss;       /* IA32_XSS: with xcr0, leaf 0xD subleaf 1 EBX */
    uint64_t apic_base; /* IA32_APIC_BASE: its enable bit is reflected in leaf 1 EDX */
};

/* Copies `count` entries into `table`, sorted by leaf and subleaf. Fails on more than PYHV_CPUID_MAX_ENTRIES, on two
 * entries for one leaf and subleaf, on a leaf that both obeys and ignores ECX, and without leaf 0. */
int pyhv_cpuid_table_init(struct pyhv_cpuid_table *table, const struct pyhv_cpuid_entry *entries, size_t count,
                          struct pyhv_error *error);

/* Answers one CPUID as a processor with this table would: out = {EAX, EBX, ECX, EDX}. Pure. */
void pyhv_cpuid_answer(const struct pyhv_cpuid_table *table, const struct pyhv_cpuid_dynamic *dynamic, uint32_t leaf,
                       uint32_t subleaf, uint32_t out[4]);

/* Executes CPUID on the processor that runs this code. */
void pyhv_cpuid_host(uint32_t leaf, uint32_t subleaf, uint32_t out[4]);

/* ------------------------------------------------------------------------------------ devices and the bus -- */

/* What a device, or the run loop, asks of whoever runs the VM. */
enum pyhv_action {
    PYHV_ACTION_NONE = 0,
    PYHV_ACTION_GUEST_EXIT = 1, /* the guest wrote its exit status; see pyhv_bus_exit_status() */
    PYHV_ACTION_RESET = 2,
    PYHV_ACTION_POWER_OFF = 3,
    PYHV_ACTION_PANIC = 4, /* the guest's kernel says that it has panicked */
};

/* Where a device's interrupt goes. `raise` may be called from any thread. */
struct pyhv_irq_sink {
    void (*raise)(void *opaque, uint32_t gsi, int32_t level);
    void *opaque;
};

/* A device: an opaque object with a name, a range of ports, and state that can be saved and loaded. Every device
 * has its own lock: port accesses from several vCPUs, save and load may come from different threads. */
struct pyhv_device;

const char *pyhv_device_name(const struct pyhv_device *device);

/* Writes the device's state (little-endian, starting with a version; documented in the device's file) to `buffer`.
 * Returns the bytes written, or -1 with an error when `capacity` is too small; PYHV_DEVICE_STATE_MAX always suffices. */
#define PYHV_DEVICE_STATE_MAX 8192
int64_t pyhv_device_save(struct pyhv_device *device, uint8_t *buffer, size_t capacity, struct pyhv_error *error);

/* Replaces the device's state. The bytes are not trusted: on failure the device is as it was. */
int pyhv_device_load(struct pyhv_device *device, const uint8_t *buffer, size_t size, struct pyhv_error *error);

/* Only for a device that is attached to no bus: a bus destroys its own. */
void pyhv_device_destroy(struct pyhv_device *device);

/* 16550A UART at `port` (8 ports), interrupt line `gsi`. Console bytes go to out_fd and come from in_fd; each may be
 * -1 (output is dropped, no input). The descriptors stay the caller's. */
struct pyhv_device *pyhv_uart16550_create(uint16_t port, uint32_t gsi, int in_fd, int out_fd, struct pyhv_error *error);

/* Keeps the last `size` bytes of output in memory instead of writing them to out_fd. Before the first run. */
int pyhv_uart16550_keep(struct pyhv_device *uart, size_t size, struct pyhv_error *error);
/* Copies up to `size` bytes of what is kept, from the byte number `from` on (the first byte of output is 0), or from the
 * first that is still there; tells the number of that one and of the one after the last. Returns how many were copied.
 * Any thread. */
size_t pyhv_uart16550_kept(struct pyhv_device *uart, uint64_t from, uint8_t *buffer, size_t size, uint64_t *first,
                           uint64_t *end);

/* Input comes from `in_fd` from now on, which stays the caller's. While nobody pumps it. */
int pyhv_uart16550_set_input(struct pyhv_device *uart, int in_fd, struct pyhv_error *error);
/* Moves bytes from the UART's in_fd into its receive FIFO, raising interrupts, until in_fd ends or
 * pyhv_uart16550_stop_input() is called from another thread. Blocks: call it on a thread of its own. Returns 0 at the
 * end of input or when stopped, -1 on a read error. */
int pyhv_uart16550_pump_input(struct pyhv_device *uart, struct pyhv_error *error);
void pyhv_uart16550_stop_input(struct pyhv_device *uart);

/* The errno with which writing to out_fd failed, 0 if it did not; from then on output is dropped. *bytes: how many so far.
 * Any thread. */
int pyhv_uart16550_lost_output(struct pyhv_device *uart, uint64_t *bytes);

/* One port; a write ends the run with the byte written as the guest's exit status. Reads are all-ones. */
struct pyhv_device *pyhv_debug_exit_create(uint16_t port, struct pyhv_error *error);

/* Keyboard controller: no keyboard, but the reset line that kernels pulse (command 0xFE to port 0x64). */
struct pyhv_device *pyhv_i8042_create(struct pyhv_error *error);

/* RTC and CMOS memory at ports 0x70 and 0x71. The RTC shows the host's UTC time. The bytes are the bytes of RAM below
 * and above 4 GiB, for the memory-size registers that firmware reads. */
struct pyhv_device *pyhv_cmos_create(uint64_t ram_below_4g, uint64_t ram_above_4g, struct pyhv_error *error);

/* ACPI power management registers at `port` (16 ports), interrupt line `gsi`. */
struct pyhv_device *pyhv_acpi_pm_create(uint16_t port, uint32_t gsi, struct pyhv_error *error);
/* General-purpose event `event`, 0 to 7, happens. Any thread. */
void pyhv_acpi_pm_event(struct pyhv_device *acpi_pm, uint32_t event);
/* Lets the timer go on by `ns` nanoseconds that have passed since its state was saved. */
void pyhv_acpi_pm_advance(struct pyhv_device *acpi_pm, uint64_t ns);

/* PCI configuration ports that say "no device", and the reset lines at ports 0xcf9 and 0x92. */
struct pyhv_device *pyhv_chipset_create(struct pyhv_error *error);

/* One port; a write with bit 0 ends the run as a panic. */
struct pyhv_device *pyhv_pvpanic_create(uint16_t port, struct pyhv_error *error);

/* Remembers where in guest memory the VM generation ID is: `gpa`. */
struct pyhv_device *pyhv_vmgenid_create(uint64_t gpa, struct pyhv_error *error);
uint64_t pyhv_vmgenid_address(struct pyhv_device *vmgenid);

/* Firmware configuration at ports 0x510 and 0x511, without items. Each item takes 4 bytes beside its own, and all of
 * them together at most PYHV_FW_CFG_MAX: what does not fit is refused, as is a key that has an item already. */
#define PYHV_FW_CFG_MAX 8000
struct pyhv_device *pyhv_fw_cfg_create(struct pyhv_error *error);
int pyhv_fw_cfg_add(struct pyhv_device *fw_cfg, uint16_t key, const uint8_t *bytes, size_t size,
                    struct pyhv_error *error);

/* The ports of a VM and the devices behind them. */
struct pyhv_bus;
struct pyhv_bus *pyhv_bus_create(struct pyhv_error *error);
void pyhv_bus_destroy(struct pyhv_bus *bus); /* and every device attached to it */

/* The bus takes the device over. Fails where a port is already taken or more than PYHV_BUS_MAX_DEVICES are attached.
 * Attach everything before the first vCPU runs. */
#define PYHV_BUS_MAX_DEVICES 32
int pyhv_bus_attach(struct pyhv_bus *bus, struct pyhv_device *device, struct pyhv_error *error);

/* Connects the devices' interrupts; without a sink they are dropped. Before the first vCPU runs. */
void pyhv_bus_set_irq_sink(struct pyhv_bus *bus, struct pyhv_irq_sink sink);

/* One port access of `count` items of `size` bytes (1, 2 or 4) at `data`, as IN, OUT and REP INS/OUTS make them.
 * Ports that nobody claims read all-ones and swallow writes. Returns an enum pyhv_action. Any thread. */
int pyhv_bus_port_io(struct pyhv_bus *bus, uint16_t port, int is_write, uint32_t size, uint32_t count, void *data);

/* The byte that came with PYHV_ACTION_GUEST_EXIT. */
uint8_t pyhv_bus_exit_status(const struct pyhv_bus *bus);

/* -------------------------------------------------------------------------------------------- guest memory -- */

/* A mapping of guest RAM: of a memfd, private and of a part of a file, or anonymous. */
struct pyhv_memory {
    uint8_t *host;     /* where it is mapped in this process */
    uint64_t size;     /* bytes, a multiple of 4096 */
    uint64_t offset;   /* in fd */
    int32_t fd;        /* the memory's own */
    int32_t of_a_file; /* 1: what the guest writes stays in this process, and the file as it is */
    int32_t anonymous; /* 1: so it is, and the file is a memfd without content: every page is this process's own */
    int32_t reserved;
};
int pyhv_memory_create(struct pyhv_memory *memory, uint64_t size, struct pyhv_error *error);
/* Anonymous memory, in huge pages where the host has some: to fill much of it takes a third of the time that a memfd's
 * pages take, which the kernel looks up one by one; but the first byte written takes 2 MiB. */
int pyhv_memory_create_anonymous(struct pyhv_memory *memory, uint64_t size, struct pyhv_error *error);
/* `size` bytes at `offset` (both multiples of 4096) of the file `fd`, which stays the caller's. */
int pyhv_memory_map_file(struct pyhv_memory *memory, int fd, uint64_t offset, uint64_t size, struct pyhv_error *error);
void pyhv_memory_destroy(struct pyhv_memory *memory);

/* Copying into and out of memory that may be gone: a file that was cut short behind a mapping is an error here, where an
 * access would be a SIGBUS. */
int pyhv_memory_read(const uint8_t *host, void *buffer, size_t size, struct pyhv_error *error);
int pyhv_memory_write(uint8_t *host, const void *buffer, size_t size, struct pyhv_error *error);

/* --------------------------------------------------------------------------------------------------- pages -- */

#define PYHV_PAGE_SIZE 4096
/* What one checksum of a snapshot's memory covers, in bytes. */
#define PYHV_CHUNK_SIZE 1048576

/* The XXH64 of `size` bytes (xxHash specification 0.1.1). It finds damage; it is no signature. Pure. */
uint64_t pyhv_xxh64(const void *data, size_t size, uint64_t seed);

/* The XXH64, with the seed 0, of each of `count` pages. Pure. */
void pyhv_page_sums(const uint8_t *pages, size_t count, uint64_t *sums);

/* 1 where all `size` bytes are zero, else 0. Pure. */
int pyhv_is_zero(const void *data, size_t size);

/* A piece of guest RAM: `size` bytes (whole pages) at `offset` of the memfd or file behind it, mapped in this process
 * at `mapped`. Without a mapping (NULL) it is read through the descriptor, which takes a copy more. is_private: the guest
 * runs on a private mapping of a file; pages that were written since are the process's own, and are taken from there.
 * data, data_end: the engine's notes about the file's holes, zero at first; whoever goes through a file piece by piece,
 * front to back, leaves them as they are. */
struct pyhv_pages {
    int32_t fd;
    uint32_t is_private;
    uint64_t offset;
    uint64_t size;
    const uint8_t *mapped;
    uint64_t data, data_end;
};

/* Writes guest RAM to `out_offset` of a file, which is extended to hold all of it; pages of zeros are not written, so
 * that place must be a hole before. sums: gets the XXH64 of each PYHV_CHUNK_SIZE bytes (the last may be shorter).
 * Nobody may write the memory meanwhile. What was never touched is neither read nor allocated. Writing to the disk is
 * begun, but the file is not synced. On failure parts of the file are written, and `sums` means nothing. Takes a second
 * thread where it can have one; call without the GIL. */
int pyhv_pages_save(struct pyhv_pages *ram, int out_fd, uint64_t out_offset, uint64_t *sums, struct pyhv_error *error);

/* Reads pages and compares each chunk with its sum. Returns 0; or 1 at the first that differs, whose number is put into
 * *bad_chunk; or -1. Call without the GIL. */
int pyhv_pages_verify(struct pyhv_pages *pages, const uint64_t *sums, uint64_t *bad_chunk, struct pyhv_error *error);

/* Bitmaps of pages: bit n % 64 of word n / 64 is page n. */

/* Sets the bit of each page of `ram` that may have content: pages in holes of a memfd, or of a file where the guest has
 * not written to them either, are zeros. */
int pyhv_pages_find(const struct pyhv_memory *ram, uint64_t *bitmap, struct pyhv_error *error);

/* How many of the first `pages` bits are set. Pure. */
uint64_t pyhv_pages_count(const uint64_t *bitmap, uint64_t pages);

/* ---------------------------------------------------------------------------------------------------- links -- */

/* A link carries messages both ways over two descriptors: sockets, pipes, ttys. A message is, little-endian: u32 type,
 * u32 length of the payload, u64 sum; then the payload. The sum is the XXH64 of the payload; its seed is the XXH64 of
 * the message's first 8 bytes, whose seed is the sum of the message before in the same direction (0 for the first). So
 * the next message tells when anything was changed, lost or repeated on the way.
 *
 * Errors of all calls, by errnum:
 *  - EPIPE: the other side has closed the link, within a message or between two;
 *  - ETIMEDOUT: nothing came from it for silence_ms;
 *  - ETIME: the time that pyhv_link_set_limit() gives is over;
 *  - ECANCELED: pyhv_link_cancel();
 *  - EBADMSG: what came is no message, too long, or has another sum; detail says which.
 * A link that had an error is good for one thing only: pyhv_link_receive() still gives messages that have come in
 * before (after EPIPE from a sending call: the other side's last words). One thread at a time, except
 * pyhv_link_cancel(). */

/* No payload. The link itself sends it when it waits and nothing was sent for heartbeat_ms, and swallows it. */
#define PYHV_MESSAGE_HEARTBEAT 1
/* Pages: u32 number of runs (1 to PYHV_RUNS_MAX), u32 zero; then a u64 a run: bits 0 to 39 the first page, 40 to 62 how
 * many, at least 1, 63: they are zeros, and have no content; then a u64 a page of the others: the XXH64 of its content,
 * seed 0. Runs ascend. Behind the payload, and counted neither in its length nor in its sum, follows the content of
 * these pages: whoever has checked the payload knows where it belongs, and reads it there. A running guest may write to
 * a page after it was summed, until it is sent: such a page comes again. One whose content has another sum is therefore
 * no error yet, but it is if it has not come once more, right or as zeros, when all have; see pyhv_landing_check(). */
#define PYHV_MESSAGE_PAGES 2
/* The same as one zstd frame: number, zero, runs and the content, without sums, for the payload has one. */
#define PYHV_MESSAGE_PAGES_ZSTD 3

/* The longest payload of any other message. */
#define PYHV_MESSAGE_MAX 1048576
/* Pages with content, and runs, in one PAGES message. All of its content stays in a processor's second cache, from one
 * step of its way to the next. */
#define PYHV_PAGES_MAX 64
#define PYHV_RUNS_MAX  512

struct pyhv_link_config {
    int32_t in_fd, out_fd; /* may be the same; stay the caller's; are made non-blocking */
    uint32_t heartbeat_ms; /* after so long without anything sent, a heartbeat is; 0: never */
    uint32_t silence_ms;   /* after waiting so long without a byte from the other side the link is broken; 0: never. The
                            * time between calls does not count; keep it under the other side's silence_ms */
};
struct pyhv_link;
struct pyhv_link *pyhv_link_create(const struct pyhv_link_config *config, struct pyhv_error *error);
void pyhv_link_destroy(struct pyhv_link *link); /* what was not sent yet is lost */

/* Makes the current call and all later ones fail with ECANCELED. Any thread. */
void pyhv_link_cancel(struct pyhv_link *link);
/* Takes that back, for a last word. */
void pyhv_link_revive(struct pyhv_link *link);

/* From now on a call that has to wait fails with ETIME once ms milliseconds have passed, even while bytes move: an other
 * side that takes or sends a byte now and then is not silent. 0: no limit. */
void pyhv_link_set_limit(struct pyhv_link *link, uint64_t ms);

/* Changes the times, which count from now. */
void pyhv_link_set_times(struct pyhv_link *link, uint32_t heartbeat_ms, uint32_t silence_ms);

/* Sends a message of at most PYHV_MESSAGE_MAX bytes, of none of the types above. `more`: another follows at once, and the
 * two may go together. Call without the GIL. */
int pyhv_link_send(struct pyhv_link *link, uint32_t type, const void *payload, size_t length, int more,
                   struct pyhv_error *error);

struct pyhv_message {
    uint32_t type;
    uint32_t length;
    const uint8_t *payload; /* the link's, until its next call */
};

/* Where received pages go. */
struct pyhv_landing {
    struct pyhv_memory *ram; /* anonymous */
    uint64_t *written;       /* a bit a page: content was put there, so that zeros must be too; all others are zeros */
    uint64_t *unsettled;     /* a bit a page: what came last had another sum; all clear at first */
    uint64_t pages, zero_pages; /* so many came: added to */
};

/* Waits, for timeout_ms at most (0: takes only what is there), for a message that is neither heartbeat nor pages; pages
 * land meanwhile (landing NULL: they are an EBADMSG). Returns 1 with *message, 0 when the time is over, or -1. Content
 * is checked when it is in its place, and stays there, right or not. Call without the GIL. */
int pyhv_link_receive(struct pyhv_link *link, struct pyhv_landing *landing, uint32_t timeout_ms,
                      struct pyhv_message *message, struct pyhv_error *error);

/* To be asked when all pages have come: fails, with EBADMSG, while the content of one, which it names, is not what was
 * summed. */
int pyhv_landing_check(const struct pyhv_landing *landing, struct pyhv_error *error);

/* Pages on their way out. */
struct pyhv_sending {
    const struct pyhv_memory
        *ram;                   /* memfd, or private mapping of a file: one that was cut short is an error, no signal */
    uint64_t *bitmap;           /* pages to send; a page's bit is cleared before the page is looked at */
    uint64_t next;              /* the page to go on at; 0 at first, and when all are sent */
    uint64_t max_bytes;         /* return after about so many bytes on the wire (whole messages); 0: no limit */
    uint32_t max_ms;            /* return after so long; 0: no limit */
    int32_t zstd_level;         /* 0: no compression. Needs pyhv_zstd_open() */
    uint64_t pages, zero_pages; /* sent with content, and as zeros: added to */
    uint64_t bytes;             /* on the wire: added to */
};

/* Sends pages until all are sent: returns 0; or 1 when a limit is reached or a message has come in that
 * pyhv_link_receive() should take: call again afterwards. The end of a message may still wait in the link then; the
 * next call of whatever kind sends it first, from guest memory, which must stay for so long. The guest may write
 * meanwhile: pages are checked for zeros, summed and sent where they stand, and a UNIX socket does not copy them before
 * the other side reads. So whatever is written to a page after its bit was cleared must set it again; and once the last
 * pages are sent nobody may write to them until the other side has them. Call without the GIL. */
int pyhv_link_send_pages(struct pyhv_link *link, struct pyhv_sending *sending, struct pyhv_error *error);

/* Since the link was created, heartbeats included. */
struct pyhv_link_counters {
    uint64_t bytes_sent, bytes_received, messages_sent, messages_received;
};
const struct pyhv_link_counters *pyhv_link_counters(const struct pyhv_link *link);

/* Opens libzstd.so.1, which a link that meets compressed pages needs. Returns -1 with the reason where it is missing. */
int pyhv_zstd_open(struct pyhv_error *error);

/* ------------------------------------------------------------------------------------------- vCPU registers -- */

struct pyhv_regs {
    uint64_t rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp;
    uint64_t r8, r9, r10, r11, r12, r13, r14, r15;
    uint64_t rip, rflags;
};

/* A segment register with its hidden part. `attributes`: the descriptor's access bits as VMX keeps them (SDM Vol. 3,
 * "Guest Register State"): type 3:0, S 4, DPL 6:5, P 7, AVL 12, L 13, D/B 14, G 15; 16: unusable. */
struct pyhv_segment {
    uint64_t base;
    uint32_t limit;
    uint32_t attributes;
    uint32_t selector;
    uint32_t reserved;
};

struct pyhv_sregs {
    struct pyhv_segment cs, ds, es, fs, gs, ss, tr, ldt;
    uint64_t gdt_base, idt_base;
    uint32_t gdt_limit, idt_limit;
    uint64_t cr0, cr2, cr3, cr4, cr8, efer, apic_base;
    uint64_t pdptrs[4]; /* PAE paging outside long mode: the four entries that the processor holds */
    uint32_t pdptrs_valid;
    uint32_t reserved;
};

/* ---------------------------------------------------------------------------------------------- running it -- */

/* Why a vCPU's run call came back. Every accelerator reports these. */
enum pyhv_stop {
    PYHV_STOP_KICKED = 1,     /* asked to by pyhv_vcpu_kick() */
    PYHV_STOP_GUEST_EXIT = 2, /* debug-exit port; `status` */
    PYHV_STOP_RESET = 3,      /* a device or the platform asked for a reset */
    PYHV_STOP_POWER_OFF = 4,
    PYHV_STOP_HALTED = 5, /* HLT, with nobody in the kernel to wait for an interrupt */
    PYHV_STOP_TRIPLE_FAULT = 6,
    PYHV_STOP_DEBUG = 7,          /* a debug event that the engine did not ask for, or one step done */
    PYHV_STOP_INTERNAL_ERROR = 8, /* the accelerator could not execute an instruction: suberror, data */
    PYHV_STOP_FAIL_ENTRY = 9,     /* hardware refused the vCPU's state: hardware_reason */
    PYHV_STOP_SYSTEM_EVENT = 10,  /* suberror: the event's type */
    PYHV_STOP_UNHANDLED = 11,     /* an exit that pyhv has no answer for: exit_reason */
    PYHV_STOP_FAILED = 12,        /* a system call failed: error */
    PYHV_STOP_TRAP_LOG_FULL = 13, /* drain it with pyhv_vcpu_trap_log() and run on */
    PYHV_STOP_TRAP_LOST = 14,     /* a declared CPUID address holds something else: rip */
    PYHV_STOP_PANIC = 15,         /* the guest's kernel says that it has panicked */
    PYHV_STOP_TRAP_EVENT = 16,    /* an interrupt or NMI waits that stepping cannot deliver */
};

/* suberror of the emulator's PYHV_STOP_INTERNAL_ERROR. */
enum {
    PYHV_SUBERROR_NO_CODE = 1,     /* where the guest wants to execute there is no RAM; KVM's number for it */
    PYHV_SUBERROR_LOST_MEMORY = 2, /* the file behind guest memory was cut short */
    PYHV_SUBERROR_NO_EVENT = 3,    /* the guest asks for an event that is not emulated: error */
};

struct pyhv_exit {
    uint32_t stop;        /* enum pyhv_stop */
    uint32_t exit_reason; /* the accelerator's own number (KVM_EXIT_*) of the last exit */
    uint32_t status;      /* PYHV_STOP_GUEST_EXIT */
    uint32_t suberror;
    uint64_t hardware_reason;
    uint64_t rip; /* linear address where the vCPU stands */
    uint32_t data_count;
    uint32_t bytes_count; /* 0 where rip could not be read */
    uint64_t data[16];
    uint8_t bytes[16];       /* the guest's memory at rip */
    struct pyhv_error error; /* PYHV_STOP_FAILED */
};

/* One CPUID that `trap` answered. */
struct pyhv_cpuid_record {
    uint64_t rip; /* linear address of the instruction */
    uint32_t leaf;
    uint32_t subleaf;
    uint32_t cpl;
    uint32_t vcpu;
    uint32_t hardware[4]; /* what this host's processor answers to the same question: EAX, EBX, ECX, EDX */
    uint32_t guest[4];    /* what the guest got */
};

/* How many exits of each kind a vCPU made. */
struct pyhv_counters {
    uint64_t port_io, mmio, interrupted, traps, cpuid_answered, step_gaps;
};

/* ----------------------------------------------------------------------------------------- the accelerators -- */

/* The system descriptor: /dev/kvm, its API version checked. Returns the descriptor, or -1. */
int pyhv_kvm_open(const char *path, struct pyhv_error *error);
/* KVM_CHECK_EXTENSION on a system or VM descriptor: 0 where the capability is absent. */
int pyhv_kvm_check_extension(int fd, uint32_t capability, struct pyhv_error *error);
/* KVM_GET_SUPPORTED_CPUID: returns the number of entries written. */
int pyhv_kvm_supported_cpuid(int kvm_fd, struct pyhv_cpuid_entry *entries, size_t capacity, struct pyhv_error *error);
/* KVM_GET_MSR_INDEX_LIST, or with `features` KVM_GET_MSR_FEATURE_INDEX_LIST: returns the number of indices. */
int pyhv_kvm_msr_list(int kvm_fd, int features, uint32_t *indices, size_t capacity, struct pyhv_error *error);
/* KVM_GET_MSRS on the system descriptor: reads one feature MSR. */
int pyhv_kvm_feature_msr(int kvm_fd, uint32_t index, uint64_t *value, struct pyhv_error *error);

struct pyhv_vm_config {
    uint32_t irqchip; /* 1: LAPICs, I/O APIC and PICs behind the contract */
    uint32_t pit;     /* 1: the 8254 too. To take KVM's down again may cost 15 ms (measured on Linux 6.18) */
    uint32_t late;    /* KVM only. 1: make them after the memory. The kernel waits for a grace period once: with 0 when
                       * memory is mapped (6.5 ms), with 1 when the VM is destroyed (15 ms); but then the VM starts at once */
    uint32_t tsc_khz; /* the emulator only: the rate of its time-stamp counter */
};

struct pyhv_vm;
/* A VM of KVM's. The devices on `bus` (NULL: none) raise their interrupts in the VM's irqchip, if it has one. */
struct pyhv_vm *pyhv_kvm_vm_create(int kvm_fd, const struct pyhv_vm_config *config, struct pyhv_bus *bus,
                                   struct pyhv_error *error);
/* Connects the bus of one that was created without, and if `pit` and it was created with an irqchip, and neither `pit` nor
 * `late`, gives it a PIT. Before its first vCPU is created. */
int pyhv_kvm_vm_adopt(struct pyhv_vm *vm, struct pyhv_bus *bus, int pit, struct pyhv_error *error);

/* The software accelerator: the CPU emulator library (Unicorn 2.1.4), opened at run time. Opens the library at `path` (a
 * file, or a name for dlopen) and checks that it is the version whose CPU state is known, by its number, its size and by
 * markers; once a process, later calls find it open. Any thread. */
int pyhv_emulator_open(const char *path, struct pyhv_error *error);
/* The rate of this host's time-stamp counter in kHz, 0 where the kernel does not tell. */
uint32_t pyhv_emulator_host_tsc_khz(void);
/* The MSRs that make up a vCPU's state: returns how many. */
size_t pyhv_emulator_msr_list(uint32_t *indices, size_t capacity);
/* A VM of the emulator's. It has one vCPU, index 0. */
struct pyhv_vm *pyhv_emulator_vm_create(const struct pyhv_vm_config *config, struct pyhv_bus *bus,
                                        struct pyhv_error *error);

/* --------------------------------------------------------------------------------- VMs of every accelerator -- */

/* From here on an operation is the same whoever executes the guest; where the two differ it is said. */
void pyhv_vm_destroy(struct pyhv_vm *vm); /* after its vCPUs and before its bus, which stays the caller's */

/* Gives `size` bytes of host memory to the guest at `gpa`; both and `host` are multiples of a page. In ascending order of
 * gpa, and before the first vCPU is created: KVM takes it later too, at a higher price. */
#define PYHV_VM_MAX_SLOTS 16
int pyhv_vm_map(struct pyhv_vm *vm, uint64_t gpa, uint64_t size, void *host, struct pyhv_error *error);

/* Begins (on = 1) or ends logging which pages of its memory the VM's vCPUs write, and the accelerator on their behalf. After
 * all memory is mapped. KVM: every piece of it but the last must be a multiple of 64 pages. The emulator, where the kernel
 * has no PAGEMAP_SCAN (before Linux 6.7): a system call that writes guest memory on the process's behalf fails while this
 * is on. On failure it is as it was. */
int pyhv_vm_log_dirty(struct pyhv_vm *vm, int on, struct pyhv_error *error);
/* Sets the bits of the pages that were written since logging began or since the last call; the others stay as they are. A
 * bit a page, in the order in which memory was mapped. */
int pyhv_vm_take_dirty(struct pyhv_vm *vm, uint64_t *bitmap, struct pyhv_error *error);

/* What a pause owes the guest, to be done before its vCPUs, of which none runs, run on: its watchdogs are told that it was
 * stopped (KVM_KVMCLOCK_CTRL), and ticks of its timers that it slept through are one, not a storm of them. */
int pyhv_vm_resume(struct pyhv_vm *vm, struct pyhv_error *error);

struct pyhv_vcpu;
struct pyhv_vcpu *pyhv_vcpu_create(struct pyhv_vm *vm, uint32_t index, struct pyhv_error *error);
void pyhv_vcpu_destroy(struct pyhv_vcpu *vcpu); /* not while it runs */

/* What CPUID answers, and with the emulator which instructions there are. Once, before the first run. */
int pyhv_vcpu_set_cpuid(struct pyhv_vcpu *vcpu, const struct pyhv_cpuid_entry *entries, size_t count,
                        struct pyhv_error *error);
/* What the accelerator says that it answers: returns the number of entries written. */
int pyhv_vcpu_get_cpuid(struct pyhv_vcpu *vcpu, struct pyhv_cpuid_entry *entries, size_t capacity,
                        struct pyhv_error *error);

int pyhv_vcpu_get_regs(struct pyhv_vcpu *vcpu, struct pyhv_regs *regs, struct pyhv_error *error);
int pyhv_vcpu_set_regs(struct pyhv_vcpu *vcpu, const struct pyhv_regs *regs, struct pyhv_error *error);
int pyhv_vcpu_get_sregs(struct pyhv_vcpu *vcpu, struct pyhv_sregs *sregs, struct pyhv_error *error);
/* Fails with ERANGE, naming the field, for a number that a vCPU cannot have. */
int pyhv_vcpu_set_sregs(struct pyhv_vcpu *vcpu, const struct pyhv_sregs *sregs, struct pyhv_error *error);

/* Reading and writing MSRs: return how many, from the first on, were taken: less than `count` where one of them does not
 * exist here or refuses its value. */
int pyhv_vcpu_get_msrs(struct pyhv_vcpu *vcpu, const uint32_t *indices, uint64_t *values, size_t count,
                       struct pyhv_error *error);
int pyhv_vcpu_set_msrs(struct pyhv_vcpu *vcpu, const uint32_t *indices, const uint64_t *values, size_t count,
                       struct pyhv_error *error);

/* The rate of its time-stamp counter: kHz, or -1. */
int pyhv_vcpu_get_tsc_khz(struct pyhv_vcpu *vcpu, struct pyhv_error *error);
const struct pyhv_counters *pyhv_vcpu_counters(const struct pyhv_vcpu *vcpu);

/* Runs the vCPU until something stops it, and says what in `exit`; answers port I/O and CPUID traps on the way. The
 * calling thread is the vCPU's thread while this runs. Call without the GIL. */
void pyhv_vcpu_run(struct pyhv_vcpu *vcpu, struct pyhv_exit *exit);

/* Makes the current or the next pyhv_vcpu_run() return PYHV_STOP_KICKED soon. Any thread. Fails, with the next run yet to
 * return, where a sandbox forbids to signal a thread. */
int pyhv_vcpu_kick(struct pyhv_vcpu *vcpu, struct pyhv_error *error);

/* 1 if the vCPU is halted and only another vCPU can wake it: interrupts are off, and nothing in the VM makes an NMI, SMI or
 * INIT; or if it waits to be started by another one. Any thread: a vCPU that runs is looked at within its run, and is
 * reported as 0 where that takes long. Of several vCPUs each is looked at in its own moment: that all wait is certain only
 * when none runs. -1 with an error. */
int pyhv_vcpu_waits_for_ever(struct pyhv_vcpu *vcpu, struct pyhv_error *error);

/* Executes one instruction and stops with PYHV_STOP_DEBUG (or what else the instruction caused). */
void pyhv_vcpu_step(struct pyhv_vcpu *vcpu, struct pyhv_exit *exit);

/* --------------------------------------------------------------------------- the state of a VM's processors -- */

/* Exceptions, interrupts and modes on their way (api.rst, KVM_GET_VCPU_EVENTS). */
struct pyhv_events {
    uint32_t exception_injected, exception_pending, exception_vector, exception_has_error, exception_error;
    uint32_t exception_has_payload;
    uint64_t exception_payload;
    uint32_t interrupt_injected, interrupt_vector, interrupt_soft, interrupt_shadow;
    uint32_t nmi_injected, nmi_pending, nmi_masked;
    uint32_t sipi_vector;
    uint32_t smm, smi_pending, smm_inside_nmi, latched_init;
    uint32_t triple_fault_pending, reserved;
};

struct pyhv_debugregs {
    uint64_t db[4];
    uint64_t dr6, dr7;
};

/* How an MSR is handled that a vCPU may have. */
enum {
    PYHV_MSR_UNUSUAL = 1,  /* it is in a state only if it holds something else than `usual` */
    PYHV_MSR_ABSENT = 2,   /* this host does not have it: it is not read */
    PYHV_MSR_UNSURE = 4,   /* KVM does not list it, so that only reading tells whether this host has it */
    PYHV_MSR_NEEDLESS = 8, /* a host that refuses it needs none */
};
struct pyhv_msr_rule {
    uint32_t index;
    uint32_t flags;
    uint64_t usual;
    char name[40];
};

/* Not an MSR: the shadow-stack pointer (CET), which is in a state under the number that KVM keeps for it and gives no guest
 * (MSR_KVM_INTERNAL_GUEST_SSP). KVM has had a call for it since Linux 6.18. */
#define PYHV_MSR_SSP 1263947263

/* What a vCPU's state can have, by its CPUID table: nothing else is saved or loaded. rules: in ascending order of index;
 * components: those of the XSAVE area, a bit each. Before the first pyhv_vm_save_state() or pyhv_vm_load_state(). */
int pyhv_vcpu_grant(struct pyhv_vcpu *vcpu, const struct pyhv_msr_rule *rules, size_t count, uint64_t components,
                    struct pyhv_error *error);

#define PYHV_XSAVE_MAX      16384
#define PYHV_LAPIC_SIZE     1024
#define PYHV_STATE_MSRS_MAX 512

/* One vCPU, between two instructions and with no port or memory access pending. */
struct pyhv_vcpu_state {
    struct pyhv_regs regs;
    struct pyhv_sregs sregs;
    struct pyhv_events events;
    struct pyhv_debugregs debugregs;
    uint64_t xcr0;
    uint32_t mp_state; /* KVM_MP_STATE_* */
    uint32_t msr_count;
    uint32_t xsave_size;
    uint32_t lapic_size; /* PYHV_LAPIC_SIZE, or 0 without an irqchip */
    uint32_t msr_indices[PYHV_STATE_MSRS_MAX];
    uint64_t msr_values[PYHV_STATE_MSRS_MAX];
    uint8_t lapic[PYHV_LAPIC_SIZE]; /* its registers as its MMIO page shows them */
    uint8_t xsave[PYHV_XSAVE_MAX];  /* in the standard format, without the zeros at its end */
};

struct pyhv_pic { /* one 8259A (api.rst, KVM_GET_IRQCHIP; the fields are those of struct kvm_pic_state) */
    uint8_t last_irr, irr, imr, isr, priority_add, irq_base, read_reg_select, poll;
    uint8_t special_mask, init_state, auto_eoi, rotate_on_auto_eoi, special_fully_nested_mode, init4, elcr, elcr_mask;
};
struct pyhv_ioapic {
    uint64_t base_address;
    uint32_t ioregsel, id, irr, reserved;
    uint64_t redirection[24];
};
struct pyhv_pit_channel {
    uint32_t initial_count, latched_count;
    uint8_t count_latched, status_latched, status, read_state, write_state, write_latch, rw_mode, mode, bcd, gate;
    uint8_t reserved[6];
    int64_t count_load_time; /* host CLOCK_MONOTONIC in ns: meaningful on its own host only */
};
struct pyhv_irqchip {
    struct pyhv_pic pic[2]; /* master, slave */
    struct pyhv_ioapic ioapic;
    struct pyhv_pit_channel pit[3]; /* zeros without a PIT */
    uint32_t pit_flags, reserved;
};

struct pyhv_state {
    uint64_t clock;   /* the guest's monotonic time in ns: kvmclock */
    uint32_t tsc_khz; /* the rate of its time-stamp counters */
    uint32_t has_irqchip;
    uint32_t has_pit;
    uint32_t vcpu_count;
    struct pyhv_vcpu_state *vcpus; /* the caller's, who says how many: those that the VM has, by their index */
    struct pyhv_irqchip irqchip;
};

/* The state of a VM whose vCPUs are all stopped. */
int pyhv_vm_save_state(struct pyhv_vm *vm, struct pyhv_state *state, struct pyhv_error *error);

/* Puts a state into a VM whose vCPUs have their CPUID tables, whose memory is mapped and which has never run. Its clocks go
 * on as if the state had been taken `elapsed_ns` before the call. On failure the VM is good for nothing but to be destroyed.
 * errnum: EPERM for an MSR that was not granted; ERANGE for what no vCPU can have; ENOTSUP for what the emulator cannot
 * have, though KVM can; another where the host refuses. */
int pyhv_vm_load_state(struct pyhv_vm *vm, const struct pyhv_state *state, uint64_t elapsed_ns,
                       struct pyhv_error *error);

/* ------------------------------------------------------------------------- trap: CPUID without the kernel -- */

#define PYHV_TRAP_MAX_SITES 4

/* KVM: answers the vCPU's CPUID instructions from `table` instead of the kernel, through guest debug. With `site_count` 0
 * every instruction is stepped; otherwise only the linear addresses in `sites`, which must be all the CPUID instructions
 * that run, through hardware breakpoints. `table` must outlive the vCPU. With `log_capacity` > 0 each answer is recorded; a
 * full log stops the run. The emulator answers every CPUID from its table anyway: what is left is the log. Before the first
 * run. */
struct pyhv_trap_config {
    const struct pyhv_cpuid_table *table;
    uint32_t site_count;
    uint32_t log_capacity;
    uint64_t sites[PYHV_TRAP_MAX_SITES];
};
int pyhv_vcpu_trap(struct pyhv_vcpu *vcpu, const struct pyhv_trap_config *config, struct pyhv_error *error);

/* Moves up to `capacity` records out of the log, oldest first; returns how many. Not while the vCPU runs. */
size_t pyhv_vcpu_trap_log(struct pyhv_vcpu *vcpu, struct pyhv_cpuid_record *records, size_t capacity);

#endif
