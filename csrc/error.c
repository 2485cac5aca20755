/* SPDX-License-Identifier: MIT
 *
 * Filling struct pyhv_error; see error.h.
 */
#include "error.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>

int pyhv_fail(struct pyhv_error *error, int errnum, const char *what, const char *format, ...)
{
    if (!error)
        return -1;

    int saved_errno = errno;
    error->errnum = errnum;
    snprintf(error->what, sizeof error->what, "%s", what);
    error->detail[0] = '\0';
    if (format) {
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(error->detail, sizeof error->detail, format, arguments);
        va_end(arguments);
    }
    errno = saved_errno;
    return -1;
}

int pyhv_fail_errno(struct pyhv_error *error, const char *what)
{
    return pyhv_fail(error, errno, what, "%s", "");
}
