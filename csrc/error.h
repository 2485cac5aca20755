/* SPDX-License-Identifier: MIT
 *
 * Filling struct pyhv_error. Internal to the engine; no state, any thread.
 */
#ifndef PYHV_ERROR_H
#define PYHV_ERROR_H

#include "pyhv.h"

/* Fills `error` (NULL: nothing is filled) and returns -1, so that a failing function can end with
 * `return pyhv_fail(...)`. `errnum` is an errno value, or 0 where no system call was involved; `what` names the call
 * or the check; `format` adds what was found, and may be NULL. Text that does not fit is cut, never overrun. errno is
 * left as it was: callers that clean up afterwards can still look at it. */
int pyhv_fail(struct pyhv_error *error, int errnum, const char *what, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* The same for a system call that has just failed and about which errno says everything. */
int pyhv_fail_errno(struct pyhv_error *error, const char *what);

#endif
