/* SPDX-License-Identifier: MIT
 *
 * 16550A UART: the guest's serial console.
 *
 * Ports: eight, from the one given at creation (COM1: 0x3f8, GSI 4). Source: National Semiconductor PC16550D datasheet;
 * "DLAB" is bit 7 of LCR.
 *
 *  0  RBR read, THR written; DLL with DLAB    4  MCR
 *  1  IER; DLM with DLAB                      5  LSR, read only
 *  2  IIR read, FCR written                   6  MSR, read only
 *  3  LCR                                     7  SCR
 *
 * What differs from the chip
 *  - The line has no speed and no errors: divisor and character format are kept and have no effect, all eight bits of
 *    a byte travel, parity and framing errors and breaks do not occur.
 *  - The character timeout is over at once: bytes below the FIFO's trigger level interrupt as a timeout (IIR 0xcc)
 *    without the wait of four character times.
 *  - The other end is always there: CTS, DSR and DCD are on, RI is off.
 *  - Received bytes are never overrun: input waits until there is room. In loopback the guest can overrun itself.
 *  - Nor are they lost on a guest that is not up yet. Input waits until the guest listens: it enables the receive interrupt,
 *    or polls, which is to look at LSR again and again, or at RBR, with nothing else in between. And what has come in when
 *    the guest clears the receive FIFO or switches it, as drivers do more than once while they start, comes in again.
 *
 * Interrupts. As on a PC the line is driven only while OUT2 (MCR bit 3) is set; loopback forces that output off, as it
 * does on the chip. The line is high while an enabled source is pending, and each change is told to the sink.
 * The "THR empty" source is an event: it comes when the transmitter runs empty and when IER enables it while the
 * transmitter is empty; a write to THR and a read of IIR that reports it take it back.
 *
 * Output. Each byte is handed to out_fd at once, and a REP OUTS as one write. Where out_fd takes no more the guest
 * waits in its OUT. When the thread is then asked to stop (cancel.h), what is not yet out stays in the transmitter,
 * as part of the saved state: LSR shows neither THRE nor TEMT, and "THR empty" comes when it is out. It goes on at
 * the next write to THR or pyhv_bus_flush(), which wait, and at the next read of LSR, which does not. The lock is free
 * during a wait; bytes that other vCPUs write meanwhile queue up behind. The transmitter holds TRANSMIT_SIZE bytes; a
 * byte that a cancelled thread writes to a full one is lost, as is on the chip what is written without THRE.
 * The first error of out_fd, a closed pipe say, ends output: from then on bytes are dropped and counted, and the guest
 * goes on. pyhv_uart16550_lost_output() tells.
 *
 * Saved state, version 1 (with the version 46 bytes and what waits for transmission):
 *   u8 IER; u8 FCR (bits 7:6, 3 and 0); u8 LCR; u8 MCR; u8 SCR; u8 DLL; u8 DLM;
 *   u8 flags: bit 0 overrun (LSR bit 1), bit 1 "THR empty" pending, bit 2 the receive FIFO has bytes of a loopback,
 *   bits 5:3 how often the guest has looked for input in vain without doing anything else (4: it polls), bits 7:6 where it
 *   did so last (0 nowhere, 1 LSR, 2 RBR); u8 MSR bits 3:0 (changes);
 *   u8 count, u8[16] receive FIFO, oldest first, zeros behind; u8 count, u8[16] bytes read from in_fd for which the
 *   FIFO had no room, likewise; u16 count, u8[count] bytes to transmit
 */
#include <errno.h>
#include <poll.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "cancel.h"
#include "devices/device.h"
#include "error.h"
#include "sigpipe.h"

#define PORTS         8
#define FIFO_SIZE     16
#define TRANSMIT_SIZE 4096

enum { RBR_THR = 0, IER = 1, IIR_FCR = 2, LCR = 3, MCR = 4, LSR = 5, MSR = 6, SCR = 7 };

#define IER_RECEIVE  0x01
#define IER_TRANSMIT 0x02
#define IER_LINE     0x04
#define IER_MODEM    0x08
#define IER_ALL      0x0f

#define IIR_NONE     0x01
#define IIR_MODEM    0x00
#define IIR_TRANSMIT 0x02
#define IIR_RECEIVE  0x04
#define IIR_LINE     0x06
#define IIR_TIMEOUT  0x0c
#define IIR_FIFOS_ON 0xc0

#define FCR_ENABLE        0x01
#define FCR_CLEAR_RECEIVE 0x02
#define FCR_DMA           0x08
#define FCR_TRIGGER       0xc0
#define FCR_KEPT          (FCR_ENABLE | FCR_DMA | FCR_TRIGGER)

#define LCR_DLAB 0x80

#define MCR_DTR      0x01
#define MCR_RTS      0x02
#define MCR_OUT1     0x04
#define MCR_OUT2     0x08
#define MCR_LOOPBACK 0x10
#define MCR_ALL      0x1f

#define LSR_DATA_READY        0x01
#define LSR_OVERRUN           0x02
#define LSR_THR_EMPTY         0x20
#define LSR_TRANSMITTER_EMPTY 0x40

#define MSR_CTS            0x10
#define MSR_DSR            0x20
#define MSR_RI             0x40
#define MSR_DCD            0x80
#define MSR_RI_WENT_OFF    0x04 /* the trailing edge; bits 0, 1 and 3 tell any change of CTS, DSR and DCD */
#define MSR_CHANGES        0x0f
#define MSR_CHANGES_EITHER 0x0b

#define SAVED_OVERRUN   0x01
#define SAVED_THR_EMPTY 0x02
#define SAVED_LOOPED    0x04
#define SAVED_LOOKS(n)  ((n) << 3)
#define SAVED_LOOK(n)   ((n) << 6)

enum { LOOK_NONE, LOOK_LSR, LOOK_RBR, POLLS = 4 };

/* What is saved: everything that the guest can tell. */
struct registers {
    uint8_t ier, fcr, lcr, mcr, scr, dll, dlm;
    uint8_t modem_changes;
    bool overrun;
    bool thr_empty_event;
    bool looped;   /* bytes in the receive FIFO are the guest's own, of a loopback */
    uint8_t look;  /* LOOK_...: what the last access read, if it looked for input and found none */
    uint8_t looks; /* how often it was the same as before; POLLS: it polls for input */
    uint8_t receive_count, held_count;
    uint16_t transmit_count;
    uint8_t receive[FIFO_SIZE];
    uint8_t held[FIFO_SIZE];
    uint8_t transmit[TRANSMIT_SIZE];
};

/* How to write to out_fd so that the thread cannot miss a kick: a signal that lands just before a write(2) that will
 * block is lost on it. That leaves one narrow place: a REP OUTS to a terminal with room for a part of it. */
enum output_way {
    OUTPUT_NOWAIT, /* pwritev2(RWF_NOWAIT), where the kernel can do it for this file: pipes since Linux 6.5 */
    OUTPUT_POLL,   /* write(2) when poll(2) has seen room: terminals, pipes before */
    OUTPUT_SOCKET, /* send(2) without waiting */
    OUTPUT_PLAIN,  /* write(2): a regular file does not block */
};

struct uart {
    struct pyhv_device device;
    struct registers r;

    int out_fd;
    _Atomic int output_way; /* enum output_way; a writer may find out without the lock that NOWAIT does not work */
    bool guard_sigpipe;
    int output_errno;     /* not 0: output has ended */
    uint64_t output_lost; /* bytes that were dropped since */
    bool sending;         /* a thread is in send_some(), without the lock */
    bool sender_waits;    /* and will not leave anything behind, unless it is asked to stop */
    unsigned waiting;     /* threads that want to send as soon as one that does not wait has done */
    uint32_t epoch;       /* counts loads: what was being sent then is no longer the transmitter's */
    pthread_cond_t sent;
    uint8_t *kept; /* a ring of the last kept_size bytes of output, which go nowhere else; NULL: there is none */
    size_t kept_size;
    uint64_t kept_end; /* bytes of output so far */

    int in_fd;
    int wake_fd; /* eventfd: the pump shall look again */
    bool pumping;
    bool pump_wants_room;
    _Atomic bool stop_input;
};

static struct uart *uart_of(struct pyhv_device *device)
{
    return (struct uart *)device;
}

/* --------------------------------------------------------------------------------------------- interrupts -- */

static uint8_t trigger_level(uint8_t fcr)
{
    static const uint8_t levels[] = {1, 4, 8, 14};
    return levels[fcr >> 6];
}

/* The pending source of the highest priority, as IIR bits 3:0. `timed_out`: the character timeout is over. */
static uint8_t pending_source(const struct registers *r, bool timed_out)
{
    if (r->ier & IER_LINE && r->overrun)
        return IIR_LINE;
    if (r->ier & IER_RECEIVE && r->receive_count > 0) {
        if (!(r->fcr & FCR_ENABLE) || r->receive_count >= trigger_level(r->fcr))
            return IIR_RECEIVE;
        if (timed_out)
            return IIR_TIMEOUT;
    }
    if (r->ier & IER_TRANSMIT && r->thr_empty_event)
        return IIR_TRANSMIT;
    if (r->ier & IER_MODEM && r->modem_changes)
        return IIR_MODEM;
    return IIR_NONE;
}

static void drive_irq(struct uart *uart, bool timed_out)
{
    bool gate = (uart->r.mcr & (MCR_OUT2 | MCR_LOOPBACK)) == MCR_OUT2;
    pyhv_device_set_irq(&uart->device, gate && pending_source(&uart->r, timed_out) != IIR_NONE);
}

/* After every change. The interrupt controller looks at edges: where an event goes away and comes back within one
 * access, this is called in between too, or a guest that handles one event an interrupt waits for good. */
static void update_irq(struct uart *uart)
{
    drive_irq(uart, true);
}

/* ------------------------------------------------------------------------------------------------- output -- */

static ssize_t write_unguarded(struct uart *uart, int way, const uint8_t *bytes, size_t count)
{
    struct iovec part = {.iov_base = (void *)bytes, .iov_len = count};
    if (way == OUTPUT_NOWAIT) /* offset -1: at the file's position, like write */
        return pwritev2(uart->out_fd, &part, 1, -1, RWF_NOWAIT);
    if (way == OUTPUT_SOCKET)
        return send(uart->out_fd, bytes, count, MSG_DONTWAIT | MSG_NOSIGNAL);
    return write(uart->out_fd, bytes, count);
}

/* The same without a SIGPIPE; a socket sends none when it is asked not to. */
static ssize_t write_once(struct uart *uart, int way, const uint8_t *bytes, size_t count)
{
    if (!uart->guard_sigpipe || way == OUTPUT_SOCKET)
        return write_unguarded(uart, way, bytes, count);

    struct pyhv_sigpipe guard;
    pyhv_sigpipe_block(&guard);
    ssize_t written = write_unguarded(uart, way, bytes, count);
    pyhv_sigpipe_restore(&guard, written < 0 && errno == EPIPE);
    return written;
}

/* Sends some of `count` bytes, without the lock. Returns how many; 0 where there is no room and it does not want to
 * wait, or the thread was asked to stop; -1 with errno where output has ended. */
static ssize_t send_some(struct uart *uart, const uint8_t *bytes, size_t count, bool wait)
{
    bool room = false;    /* poll has just seen some */
    bool refused = false; /* and yet it was not enough */
    for (;;) {
        int way = atomic_load_explicit(&uart->output_way, memory_order_relaxed);
        if (way == OUTPUT_NOWAIT && refused) /* for a reason that poll does not know: no endless loop */
            way = OUTPUT_POLL;
        if (way != OUTPUT_POLL || room) {
            /* A write that finds room for a part of its bytes sends that and blocks. Who must not block (a kick that
             * has come already will not come again) writes one byte: poll saw room for it. */
            bool may_block = wait && !refused && !pyhv_cancelled();
            ssize_t sent = write_once(uart, way, bytes, way != OUTPUT_POLL || may_block ? count : 1);
            if (sent > 0)
                return sent;
            refused = room && sent < 0 && errno == EAGAIN;
            if (sent < 0 && errno != EAGAIN && errno != EINTR) {
                if (way != OUTPUT_NOWAIT)
                    return -1;
                /* Not for this file or this kernel; or an error that write will report as well. */
                atomic_store_explicit(&uart->output_way, OUTPUT_POLL, memory_order_relaxed);
            }
        }
        if (room && (!wait || pyhv_cancelled()))
            return 0;

        /* In slices, for the signal of a kick may come just before the poll. An error condition counts as room: the
         * write will say what it is. */
        struct pollfd out = {.fd = uart->out_fd, .events = POLLOUT};
        bool patient = wait && !pyhv_cancelled();
        room = poll(&out, 1, patient ? PYHV_CANCEL_SLICE_MS : 0) > 0;
        if (!room && (!wait || pyhv_cancelled()))
            return 0;
    }
}

static bool has_output(const struct uart *uart)
{
    return uart->out_fd >= 0 && uart->output_errno == 0;
}

static void keep(struct uart *uart, const uint8_t *bytes, size_t count)
{
    while (count > 0) {
        size_t at = uart->kept_end % uart->kept_size;
        size_t part = count < uart->kept_size - at ? count : uart->kept_size - at;
        memcpy(uart->kept + at, bytes, part);
        uart->kept_end += part;
        bytes += part;
        count -= part;
    }
}

static void drop_output(struct uart *uart)
{
    struct registers *r = &uart->r;
    if (uart->output_errno)
        uart->output_lost += r->transmit_count;
    r->transmit_count = 0;
    r->thr_empty_event = true;
}

/* Waits, with the lock free, until the thread that is sending has made progress. Not for longer than a slice: a signal
 * does not end a wait for a condition. */
static void wait_for_sender(struct uart *uart)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_nsec += PYHV_CANCEL_SLICE_MS * 1000000L;
    if (until.tv_nsec >= 1000000000L) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000L;
    }
    pthread_cond_timedwait(&uart->sent, &uart->device.lock, &until);
}

/* Sends what the transmitter holds. With `wait` until it is empty or the thread is asked to stop. Gives the lock back
 * while it writes. Where another thread that waits is sending already, that one takes the new bytes along. */
static void transmit(struct uart *uart, bool wait)
{
    struct registers *r = &uart->r;
    uint8_t bytes[TRANSMIT_SIZE];

    if (uart->kept) {
        if (r->transmit_count > 0) {
            keep(uart, r->transmit, r->transmit_count);
            drop_output(uart);
        }
        return;
    }
    if (!wait && uart->waiting)
        return;
    /* One that does not wait gives up where there is no room: what it leaves would be sent by nobody. */
    uart->waiting++;
    while (wait && uart->sending && !uart->sender_waits && !pyhv_cancelled())
        wait_for_sender(uart);
    uart->waiting--;
    if (uart->sending || r->transmit_count == 0)
        return;
    uart->sending = true;
    uart->sender_waits = wait;
    while (r->transmit_count > 0) {
        if (!has_output(uart)) {
            drop_output(uart);
            break;
        }
        uint32_t epoch = uart->epoch;
        size_t count = r->transmit_count;
        memcpy(bytes, r->transmit, count);
        pthread_mutex_unlock(&uart->device.lock);
        ssize_t sent = send_some(uart, bytes, count, wait);
        int errnum = errno;
        pthread_mutex_lock(&uart->device.lock);
        if (sent < 0)
            uart->output_errno = errnum;
        if (epoch != uart->epoch)
            continue;
        if (sent == 0)
            break;
        if (sent > 0) {
            r->transmit_count -= (uint16_t)sent;
            memmove(r->transmit, r->transmit + sent, r->transmit_count);
            r->thr_empty_event = r->transmit_count == 0;
        }
    }
    uart->sending = false;
    pthread_cond_broadcast(&uart->sent);
}

/* The guest writes to THR, outside loopback. */
static void write_thr(struct uart *uart, const uint8_t *bytes, uint32_t count)
{
    struct registers *r = &uart->r;
    r->thr_empty_event = false;
    update_irq(uart);
    if (uart->kept) {
        transmit(uart, false); /* what was loaded with a state */
        keep(uart, bytes, count);
        drop_output(uart);
        return;
    }
    if (!has_output(uart)) {
        if (uart->output_errno)
            uart->output_lost += count;
        drop_output(uart);
        return;
    }
    while (count > 0) {
        uint32_t room = TRANSMIT_SIZE - r->transmit_count;
        uint32_t part = count < room ? count : room;
        memcpy(r->transmit + r->transmit_count, bytes, part);
        r->transmit_count += (uint16_t)part;
        bytes += part;
        count -= part;
        transmit(uart, true);
        if (count > 0 && r->transmit_count == TRANSMIT_SIZE) {
            if (pyhv_cancelled())
                break;
            wait_for_sender(uart);
        }
    }
}

/* -------------------------------------------------------------------------------------------------- input -- */

/* Whether input may come in: see the top. */
static uint8_t receive_room(const struct registers *r)
{
    if (r->mcr & MCR_LOOPBACK) /* the line is disconnected */
        return 0;
    if (!(r->ier & IER_RECEIVE) && r->looks < POLLS)
        return 0;
    return (uint8_t)((r->fcr & FCR_ENABLE ? FIFO_SIZE : 1) - r->receive_count);
}

/* Moves on what came in, and lets the pump fetch more. To be called after whatever makes room, when the interrupt line
 * shows that. The pump is woken when the FIFO is empty, not for each byte that the guest takes out. */
static void refill(struct uart *uart)
{
    struct registers *r = &uart->r;
    uint8_t count = receive_room(r);
    if (count > r->held_count)
        count = r->held_count;
    memcpy(r->receive + r->receive_count, r->held, count);
    r->receive_count += count;
    r->held_count -= count;
    memmove(r->held, r->held + count, r->held_count);

    if (uart->pump_wants_room && r->receive_count == 0 && receive_room(r) > 0) {
        uart->pump_wants_room = false;
        eventfd_write(uart->wake_fd, 1);
    }
}

/* Clears the receive FIFO. The other end has not sent yet what the guest has not taken: it waits in front of what came
 * after it. More than fits there cannot be: the pump fetches no more than there is room for in the FIFO. */
static void clear_receive(struct registers *r)
{
    uint8_t count = r->looped ? 0 : r->receive_count;
    if (count > FIFO_SIZE - r->held_count)
        count = FIFO_SIZE - r->held_count;
    memmove(r->held + count, r->held, r->held_count);
    memcpy(r->held, r->receive, count);
    r->held_count += count;
    r->receive_count = 0;
    r->looped = false;
    r->looks = 0;
}

/* Finds out whether the guest polls for input. A driver that starts, or writes to the console by polling, reads LSR too,
 * and RBR once in a while, but not the same one again and again. */
static void note_access(struct uart *uart, uint32_t offset, bool is_read)
{
    struct registers *r = &uart->r;
    bool looks = is_read && r->receive_count == 0 && (offset == RBR_THR || (offset == LSR && r->transmit_count == 0));
    uint8_t look = !looks ? LOOK_NONE : offset == LSR ? LOOK_LSR : LOOK_RBR;
    if (offset != RBR_THR && offset != LSR) /* it is busy with other things */
        r->looks = r->looks < POLLS ? 0 : POLLS;
    else if (looks && r->look == look && r->looks < POLLS && !(r->ier & IER_RECEIVE) && ++r->looks == POLLS)
        refill(uart);
    r->look = look;
}

static uint8_t read_rbr(struct uart *uart)
{
    struct registers *r = &uart->r;
    if (r->receive_count == 0)
        return 0;
    uint8_t byte = r->receive[0];
    r->receive_count--;
    r->looped = r->looped && r->receive_count > 0;
    memmove(r->receive, r->receive + 1, r->receive_count);
    drive_irq(uart, false); /* the read starts the character timeout anew */
    refill(uart);
    return byte;
}

/* The guest writes to THR in loopback: the byte arrives at once. */
static void loop_back(struct registers *r, uint8_t byte)
{
    r->looped = true;
    if (!(r->fcr & FCR_ENABLE)) { /* the new byte takes the old one's place */
        r->overrun |= r->receive_count > 0;
        r->receive[0] = byte;
        r->receive_count = 1;
    } else if (r->receive_count < FIFO_SIZE) {
        r->receive[r->receive_count++] = byte;
    } else { /* the FIFO keeps what it has */
        r->overrun = true;
    }
    r->thr_empty_event = r->transmit_count == 0; /* bytes from before the loopback may still wait for out_fd */
}

int pyhv_uart16550_set_input(struct pyhv_device *device, int in_fd, struct pyhv_error *error)
{
    struct uart *uart = uart_of(device);
    int wake_fd = uart->wake_fd >= 0 ? uart->wake_fd : eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (wake_fd < 0)
        return pyhv_fail(error, errno, "eventfd", "for uart16550");
    pthread_mutex_lock(&device->lock);
    uart->wake_fd = wake_fd;
    uart->in_fd = in_fd;
    pthread_mutex_unlock(&device->lock);
    return 0;
}

int pyhv_uart16550_pump_input(struct pyhv_device *device, struct pyhv_error *error)
{
    struct uart *uart = uart_of(device);
    int result = 0;

    if (uart->in_fd < 0)
        return 0;
    pthread_mutex_lock(&device->lock);
    bool taken = uart->pumping;
    uart->pumping = true;
    pthread_mutex_unlock(&device->lock);
    if (taken)
        return pyhv_fail(error, EBUSY, "uart16550: input", "another thread pumps it");

    /* The flag says to stop; the eventfd only wakes. So a stop that comes before the pump counts too, and each stop
     * ends one pump. */
    while (!atomic_exchange(&uart->stop_input, false)) {
        uint8_t bytes[FIFO_SIZE];
        eventfd_t ignored;

        pthread_mutex_lock(&device->lock);
        uint8_t room = uart->r.held_count ? 0 : receive_room(&uart->r);
        uart->pump_wants_room = room == 0;
        pthread_mutex_unlock(&device->lock);

        struct pollfd wake_and_in[] = {
            {.fd = uart->wake_fd, .events = POLLIN},
            {.fd = room ? uart->in_fd : -1, .events = POLLIN}, /* without room its end must not keep us busy */
        };
        if (poll(wake_and_in, 2, -1) < 0) {
            if (errno == EINTR)
                continue;
            result = pyhv_fail(error, errno, "poll", "for the serial console's input");
            break;
        }
        if (wake_and_in[0].revents) {
            eventfd_read(uart->wake_fd, &ignored);
            continue;
        }
        ssize_t count = read(uart->in_fd, bytes, room);
        if (count == 0)
            break;
        if (count < 0) {
            if (errno == EINTR || errno == EAGAIN)
                continue;
            result = pyhv_fail(error, errno, "read", "the serial console's input");
            break;
        }
        /* The guest may have changed its mind about FIFO or loopback since: what has no room now is held. */
        pthread_mutex_lock(&device->lock);
        if (count > FIFO_SIZE - uart->r.held_count) /* only if a state was loaded meanwhile */
            count = FIFO_SIZE - uart->r.held_count;
        memcpy(uart->r.held + uart->r.held_count, bytes, (size_t)count);
        uart->r.held_count += (uint8_t)count;
        refill(uart);
        update_irq(uart);
        pthread_mutex_unlock(&device->lock);
    }

    pthread_mutex_lock(&device->lock);
    uart->pumping = false;
    uart->pump_wants_room = false;
    pthread_mutex_unlock(&device->lock);
    return result;
}

int pyhv_uart16550_lost_output(struct pyhv_device *device, uint64_t *bytes)
{
    struct uart *uart = uart_of(device);
    pthread_mutex_lock(&device->lock);
    int errnum = uart->output_errno;
    *bytes = uart->output_lost;
    pthread_mutex_unlock(&device->lock);
    return errnum;
}

void pyhv_uart16550_stop_input(struct pyhv_device *device)
{
    struct uart *uart = uart_of(device);
    if (uart->in_fd < 0)
        return;
    atomic_store(&uart->stop_input, true);
    eventfd_write(uart->wake_fd, 1);
}

/* ---------------------------------------------------------------------------------------------- registers -- */

/* MSR bits 7:4. In loopback the outputs come back as inputs: DTR as DSR, RTS as CTS, OUT1 as RI, OUT2 as DCD. */
static uint8_t modem_lines(const struct registers *r)
{
    if (!(r->mcr & MCR_LOOPBACK))
        return MSR_CTS | MSR_DSR | MSR_DCD;
    return (uint8_t)((r->mcr & MCR_RTS ? MSR_CTS : 0) | (r->mcr & MCR_DTR ? MSR_DSR : 0) |
                     (r->mcr & MCR_OUT1 ? MSR_RI : 0) | (r->mcr & MCR_OUT2 ? MSR_DCD : 0));
}

static void write_ier(struct registers *r, uint8_t value)
{
    /* Enabled while the transmitter is empty: interrupts at once. Linux relies on it to start transmitting. */
    if (value & ~r->ier & IER_TRANSMIT)
        r->thr_empty_event = r->transmit_count == 0;
    r->ier = value & IER_ALL;
    if (r->ier & IER_RECEIVE) /* it need not poll any more */
        r->looks = 0;
}

static void write_fcr(struct registers *r, uint8_t value)
{
    if ((value ^ r->fcr) & FCR_ENABLE || value & FCR_CLEAR_RECEIVE)
        clear_receive(r);
    /* The other bits count only together with bit 0. Clearing the transmit FIFO (bit 2) does not reach bytes that wait
     * for out_fd: for the guest they are on the line. */
    r->fcr = value & FCR_ENABLE ? value & FCR_KEPT : 0;
}

static void write_mcr(struct registers *r, uint8_t value)
{
    uint8_t before = modem_lines(r);
    r->mcr = value & MCR_ALL;
    uint8_t now = modem_lines(r);
    r->modem_changes |= (before ^ now) >> 4 & MSR_CHANGES_EITHER;
    if (before & ~now & MSR_RI)
        r->modem_changes |= MSR_RI_WENT_OFF;
}

static uint8_t read_iir(struct registers *r)
{
    uint8_t source = pending_source(r, true);
    if (source == IIR_TRANSMIT)
        r->thr_empty_event = false;
    return source | (r->fcr & FCR_ENABLE ? IIR_FIFOS_ON : 0);
}

static uint8_t read_lsr(struct uart *uart)
{
    struct registers *r = &uart->r;
    transmit(uart, false);
    uint8_t lsr = (r->receive_count ? LSR_DATA_READY : 0) | (r->overrun ? LSR_OVERRUN : 0) |
                  (r->transmit_count ? 0 : LSR_THR_EMPTY | LSR_TRANSMITTER_EMPTY);
    r->overrun = false;
    return lsr;
}

static uint8_t read_msr(struct registers *r)
{
    uint8_t msr = modem_lines(r) | r->modem_changes;
    r->modem_changes = 0;
    return msr;
}

static uint32_t uart_read(struct pyhv_device *device, uint32_t offset, uint32_t size)
{
    struct uart *uart = uart_of(device);
    struct registers *r = &uart->r;
    bool dlab = r->lcr & LCR_DLAB;
    uint8_t value = 0;
    (void)size;
    note_access(uart, offset, !(offset == RBR_THR && dlab));
    switch (offset) {
    case RBR_THR:
        value = dlab ? r->dll : read_rbr(uart);
        break;
    case IER:
        value = dlab ? r->dlm : r->ier;
        break;
    case IIR_FCR:
        value = read_iir(r);
        break;
    case LCR:
        value = r->lcr;
        break;
    case MCR:
        value = r->mcr;
        break;
    case LSR:
        value = read_lsr(uart);
        break;
    case MSR:
        value = read_msr(r);
        break;
    case SCR:
        value = r->scr;
        break;
    }
    update_irq(uart);
    return value;
}

static enum pyhv_action uart_write(struct pyhv_device *device, uint32_t offset, uint32_t size, uint32_t value)
{
    struct uart *uart = uart_of(device);
    struct registers *r = &uart->r;
    bool dlab = r->lcr & LCR_DLAB;
    uint8_t byte = (uint8_t)value;
    (void)size;
    note_access(uart, offset, false);
    switch (offset) {
    case RBR_THR:
        if (dlab)
            r->dll = byte;
        else if (r->mcr & MCR_LOOPBACK)
            loop_back(r, byte);
        else
            write_thr(uart, &byte, 1);
        break;
    case IER:
        if (dlab)
            r->dlm = byte;
        else
            write_ier(r, byte);
        refill(uart);
        break;
    case IIR_FCR:
        write_fcr(r, byte);
        update_irq(uart);
        refill(uart);
        break;
    case LCR:
        r->lcr = byte;
        break;
    case MCR:
        write_mcr(r, byte);
        refill(uart);
        break;
    case LSR:
    case MSR:
        break;
    case SCR:
        r->scr = byte;
        break;
    }
    update_irq(uart);
    return PYHV_ACTION_NONE;
}

static enum pyhv_action uart_write_string(struct pyhv_device *device, uint32_t offset, const uint8_t *bytes,
                                          uint32_t count)
{
    struct uart *uart = uart_of(device);
    if (offset == RBR_THR && !(uart->r.lcr & LCR_DLAB) && !(uart->r.mcr & MCR_LOOPBACK)) {
        note_access(uart, offset, false);
        write_thr(uart, bytes, count);
        update_irq(uart);
    } else {
        for (uint32_t i = 0; i < count; i++)
            uart_write(device, offset, 1, bytes[i]);
    }
    return PYHV_ACTION_NONE;
}

static void uart_flush(struct pyhv_device *device)
{
    struct uart *uart = uart_of(device);
    transmit(uart, true);
    update_irq(uart);
}

/* ------------------------------------------------------------------------------------------------- state -- */

static void uart_save(struct pyhv_device *device, struct pyhv_writer *out)
{
    const struct registers *r = &uart_of(device)->r;
    uint8_t flags = (r->overrun ? SAVED_OVERRUN : 0) | (r->thr_empty_event ? SAVED_THR_EMPTY : 0) |
                    (r->looped ? SAVED_LOOPED : 0) | SAVED_LOOKS(r->looks) | SAVED_LOOK(r->look);
    uint8_t fifo[FIFO_SIZE];

    pyhv_put_int(out, r->ier, 1);
    pyhv_put_int(out, r->fcr, 1);
    pyhv_put_int(out, r->lcr, 1);
    pyhv_put_int(out, r->mcr, 1);
    pyhv_put_int(out, r->scr, 1);
    pyhv_put_int(out, r->dll, 1);
    pyhv_put_int(out, r->dlm, 1);
    pyhv_put_int(out, flags, 1);
    pyhv_put_int(out, r->modem_changes, 1);
    memset(fifo, 0, sizeof fifo);
    memcpy(fifo, r->receive, r->receive_count);
    pyhv_put_int(out, r->receive_count, 1);
    pyhv_put_bytes(out, fifo, FIFO_SIZE);
    memset(fifo, 0, sizeof fifo);
    memcpy(fifo, r->held, r->held_count);
    pyhv_put_int(out, r->held_count, 1);
    pyhv_put_bytes(out, fifo, FIFO_SIZE);
    pyhv_put_int(out, r->transmit_count, 2);
    pyhv_put_bytes(out, r->transmit, r->transmit_count);
}

static int uart_load(struct pyhv_device *device, struct pyhv_reader *in, struct pyhv_error *error)
{
    struct uart *uart = uart_of(device);
    struct registers r = {0};

    r.ier = (uint8_t)pyhv_get_int(in, 1);
    r.fcr = (uint8_t)pyhv_get_int(in, 1);
    r.lcr = (uint8_t)pyhv_get_int(in, 1);
    r.mcr = (uint8_t)pyhv_get_int(in, 1);
    r.scr = (uint8_t)pyhv_get_int(in, 1);
    r.dll = (uint8_t)pyhv_get_int(in, 1);
    r.dlm = (uint8_t)pyhv_get_int(in, 1);
    uint8_t flags = (uint8_t)pyhv_get_int(in, 1);
    r.modem_changes = (uint8_t)pyhv_get_int(in, 1);
    r.receive_count = (uint8_t)pyhv_get_int(in, 1);
    pyhv_get_bytes(in, r.receive, FIFO_SIZE);
    r.held_count = (uint8_t)pyhv_get_int(in, 1);
    pyhv_get_bytes(in, r.held, FIFO_SIZE);
    r.transmit_count = (uint16_t)pyhv_get_int(in, 2);
    if (r.transmit_count > TRANSMIT_SIZE)
        return pyhv_device_refuse_state(device, error, "%u bytes to transmit, at most %d", r.transmit_count,
                                        TRANSMIT_SIZE);
    pyhv_get_bytes(in, r.transmit, r.transmit_count);
    if (in->truncated)
        return pyhv_device_refuse_state(device, error, "the state is cut short");
    if (in->left)
        return pyhv_device_refuse_state(device, error, "%zu bytes too many", in->left);

    if (r.ier & ~IER_ALL || r.mcr & ~MCR_ALL || r.modem_changes & ~MSR_CHANGES || (flags >> 3 & 7) > POLLS ||
        flags >> 6 > LOOK_RBR || r.fcr & ~FCR_KEPT || (r.fcr && !(r.fcr & FCR_ENABLE)))
        return pyhv_device_refuse_state(
            device, error,
            "bits are set that the chip does not keep: IER 0x%02x FCR 0x%02x MCR 0x%02x MSR 0x%02x flags 0x%02x", r.ier,
            r.fcr, r.mcr, r.modem_changes, flags);
    if (r.receive_count > (r.fcr & FCR_ENABLE ? FIFO_SIZE : 1) || r.held_count > FIFO_SIZE)
        return pyhv_device_refuse_state(device, error, "%u bytes received and %u held, with FCR 0x%02x",
                                        r.receive_count, r.held_count, r.fcr);
    r.overrun = flags & SAVED_OVERRUN;
    r.thr_empty_event = flags & SAVED_THR_EMPTY;
    r.looped = flags & SAVED_LOOPED;
    r.looks = flags >> 3 & 7;
    r.look = flags >> 6;
    if (r.thr_empty_event && r.transmit_count)
        return pyhv_device_refuse_state(device, error, "THR cannot be empty with %u bytes to transmit",
                                        r.transmit_count);

    uart->r = r;
    uart->epoch++;
    refill(uart);
    update_irq(uart);
    return 0;
}

/* --------------------------------------------------------------------------------------------------- life -- */

static void uart_release(struct pyhv_device *device)
{
    struct uart *uart = uart_of(device);
    if (uart->wake_fd >= 0)
        close(uart->wake_fd);
    pthread_cond_destroy(&uart->sent);
    free(uart->kept);
}

static const struct pyhv_device_ops uart_ops = {
    .name = "uart16550",
    .size = sizeof(struct uart),
    .state_version = 1,
    .max_access = 1,
    .read = uart_read,
    .write = uart_write,
    .write_string = uart_write_string,
    .flush = uart_flush,
    .save = uart_save,
    .load = uart_load,
    .release = uart_release,
};

/* wait_for_sender() counts in monotonic time, so that setting the host's clock does not stretch a slice. */
static int init_condition(pthread_cond_t *condition)
{
    pthread_condattr_t attributes;
    int errnum = pthread_condattr_init(&attributes);
    if (errnum)
        return errnum;
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    errnum = pthread_cond_init(condition, &attributes);
    pthread_condattr_destroy(&attributes);
    return errnum;
}

struct pyhv_device *pyhv_uart16550_create(uint16_t port, uint32_t gsi, int in_fd, int out_fd, struct pyhv_error *error)
{
    struct pyhv_device *device = pyhv_device_create(&uart_ops, port, PORTS, error);
    if (!device)
        return NULL;
    struct uart *uart = uart_of(device);
    int errnum = init_condition(&uart->sent);
    if (errnum) {
        pyhv_fail(error, errnum, "pthread_cond_init", "for uart16550");
        pthread_mutex_destroy(&device->lock);
        free(uart);
        return NULL;
    }
    device->gsi = gsi;
    uart->in_fd = in_fd;
    uart->out_fd = out_fd;
    uart->wake_fd = -1;
    uart->r.dll = 12; /* 9600 baud, as firmware leaves it */
    if (in_fd >= 0) {
        uart->wake_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
        if (uart->wake_fd < 0) {
            pyhv_fail(error, errno, "eventfd", "for uart16550");
            pyhv_device_destroy(device);
            return NULL;
        }
    }
    if (out_fd >= 0) {
        struct stat out;
        mode_t mode = fstat(out_fd, &out) == 0 ? out.st_mode : 0;
        atomic_init(&uart->output_way, S_ISREG(mode) ? OUTPUT_PLAIN : S_ISSOCK(mode) ? OUTPUT_SOCKET : OUTPUT_NOWAIT);
        uart->guard_sigpipe = pyhv_sigpipe_matters();
    }
    return device;
}

int pyhv_uart16550_keep(struct pyhv_device *device, size_t size, struct pyhv_error *error)
{
    struct uart *uart = uart_of(device);
    uart->kept = malloc(size);
    if (!uart->kept)
        return pyhv_fail(error, ENOMEM, "malloc", "for the console's output");
    uart->kept_size = size;
    return 0;
}

size_t pyhv_uart16550_kept(struct pyhv_device *device, uint64_t from, uint8_t *buffer, size_t size, uint64_t *first,
                           uint64_t *end)
{
    struct uart *uart = uart_of(device);
    pthread_mutex_lock(&device->lock);
    *end = uart->kept_end;
    *first = *end > uart->kept_size ? *end - uart->kept_size : 0;
    if (from < *first)
        from = *first;
    size_t count = from < *end ? (size_t)(*end - from) : 0;
    if (count > size)
        count = size;
    if (count > 0) {
        size_t at = from % uart->kept_size;
        size_t part = count < uart->kept_size - at ? count : uart->kept_size - at;
        memcpy(buffer, uart->kept + at, part);
        memcpy(buffer + part, uart->kept, count - part);
    }
    pthread_mutex_unlock(&device->lock);
    return count;
}
