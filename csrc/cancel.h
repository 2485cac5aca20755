/* SPDX-License-Identifier: MIT
 *
 * How a thread inside the engine learns that it was asked to stop.
 *
 * A kick sets a flag and sends the vCPU's thread a signal. Between guest instructions the run loop sees the flag;
 * a device that blocks in a system call on that thread sees the call fail with EINTR, and must then know whether
 * it was the kick, or any other signal that it should sleep on after. The run loop points pyhv_cancel at its flag
 * around each run and back to NULL afterwards. The flag, not the signal, is what counts.
 *
 * A signal that lands between the look at the flag and the system call would be lost there, and the call would
 * block for good. Who blocks therefore does it in slices of PYHV_CANCEL_SLICE_MS and looks again.
 */
#ifndef PYHV_CANCEL_H
#define PYHV_CANCEL_H

#include <stdatomic.h>
#include <stddef.h>

/* The calling thread's flag: non-zero means stop. NULL (a thread that runs no vCPU) means carry on. */
extern _Thread_local const _Atomic int *pyhv_cancel;

/* The longest time, in milliseconds, for which a blocked device may miss a kick whose signal came too early. */
#define PYHV_CANCEL_SLICE_MS 5

static inline int pyhv_cancelled(void)
{
    const _Atomic int *flag = pyhv_cancel;
    return flag != NULL && atomic_load_explicit(flag, memory_order_acquire) != 0;
}

#endif
