/* The Linux guest that is moved: see ride.c. */
#pragma once

__attribute__((noreturn)) void ride(void);
