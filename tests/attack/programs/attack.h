// What the attack programs share. Each says on one line what worked; nobody believes it: the verdict is the host's.
#pragma once
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define COUNT(array) (sizeof(array) / sizeof *(array))

struct attack {
    const char *name;
    int (*run)(int argc, char **argv);
};

// One table per source file, ended by a null name.
extern const struct attack modules_attacks[], files_attacks[], machine_attacks[], exhaust_attacks[], probe_attacks[];

// Notes one try: counted, and named in the summary if it worked.
void note(bool worked, const char *format, ...) __attribute__((format(printf, 2, 3)));
// Seconds since some start.
double now(void);
// Writes a text to a file that exists or not; true if all of it went.
bool put(const char *path, const char *text);
