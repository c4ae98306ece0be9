// probe NAME [ARG...]: what files can do that busybox has no command for. Not an attempt at anything: each prints what it
// found, error numbers by name, and the suite compares it with what a container of runc prints (tests/src/cases/alike).
#include "attack.h"
#include <dirent.h>
#include <limits.h>
#include <linux/fiemap.h>
#include <linux/fs.h>
#include <sys/file.h>
#include <sys/inotify.h>
#include <sys/resource.h>
#include <sys/statfs.h>
#include <sys/un.h>
#include <sys/xattr.h>

// Prints what a call gave: a number, or the name of its error.
static long said(const char *what, long result) {
    if (result < 0) printf("%s %s\n", what, strerrorname_np(errno));
    else printf("%s %ld\n", what, result);
    return result;
}

// The same of a call whose result only tells whether it worked.
static bool worked(const char *what, long result) {
    said(what, result < 0 ? result : 0);
    return result >= 0;
}

static int fresh(const char *name) {
    int fd = open(name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    if (fd < 0) worked(name, fd);
    return fd;
}

static void fill(int fd, char byte, off_t at, size_t length) {
    char *block = malloc(length);
    memset(block, byte, length);
    if (pwrite(fd, block, length, at) != (ssize_t)length) worked("fill", -1);
    free(block);
}

static long long blocks(int fd) {
    struct stat stat;
    return fstat(fd, &stat) ? -1 : (long long)stat.st_blocks;
}

// The kinds that a listing tells, beside those of lstat.
static void kinds(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "k-socket"};
    mkdir("k-dir", 0755), mkfifo("k-fifo", 0644), close(fresh("k-file"));
    if (symlink("k-file", "k-link")) worked("symlink", -1);
    bind(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&address, sizeof address);
    worked("whiteout", mknod("k-whiteout", S_IFCHR, 0));
    worked("device", mknod("k-device", S_IFCHR | 0600, makedev(1, 3)));
    for (int time = 0; time < 2; time++) { // the second time from what is cached
        DIR *directory = opendir(".");
        int wrong = 0, found = 0;
        for (struct dirent *entry; (entry = readdir(directory));) {
            struct stat stat;
            if (strncmp(entry->d_name, "k-", 2) || lstat(entry->d_name, &stat)) continue;
            found++;
            if (entry->d_type != IFTODT(stat.st_mode) || entry->d_ino != stat.st_ino) printf("%s is told as %d\n", entry->d_name, entry->d_type), wrong++;
        }
        printf("%d found, %d wrong\n", found, wrong);
        closedir(directory);
    }
}

static void temporary(void) {
    int fd = open(".", O_TMPFILE | O_RDWR | O_CLOEXEC, 0640);
    if (!worked("O_TMPFILE", fd)) return;
    said("write", write(fd, "text", 4));
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    worked("link", linkat(AT_FDCWD, path, AT_FDCWD, "named", AT_SYMLINK_FOLLOW));
    struct stat stat;
    if (worked("stat", lstat("named", &stat))) printf("%o %ld\n", stat.st_mode & 07777, (long)stat.st_size);
    fd = open(".", O_TMPFILE | O_EXCL | O_RDWR | O_CLOEXEC, 0640);
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    worked("link of an exclusive one", linkat(AT_FDCWD, path, AT_FDCWD, "never", AT_SYMLINK_FOLLOW));
}

static void copies(void) {
    int from = fresh("c-from"), to = fresh("c-to");
    fill(from, 'a', 0, 100000);
    off_t at = 10;
    said("copy", copy_file_range(from, &at, to, NULL, 50000, 0));
    said("copy at the end", copy_file_range(from, &(off_t){99990}, to, NULL, 50, 0));
    said("size", lseek(to, 0, SEEK_END));
    said("copy within one", copy_file_range(from, &(off_t){0}, from, &(off_t){200000}, 1000, 0));
    said("copy onto itself", copy_file_range(from, &(off_t){0}, from, &(off_t){10}, 1000, 0));
    said("read-only", copy_file_range(from, &(off_t){0}, open("c-to", O_RDONLY), NULL, 10, 0));
    int other = open("/dev/shm/c-other", O_RDWR | O_CREAT | O_TRUNC, 0600);
    said("another file system", copy_file_range(from, &(off_t){0}, other, NULL, 10, 0));
    worked("clone", ioctl(to, FICLONE, from));
    unlink("/dev/shm/c-other");
}

static void holes(void) {
    int fd = fresh("h");
    fill(fd, 'x', 1 << 20, 4096);
    said("data", lseek(fd, 0, SEEK_DATA));
    said("hole", lseek(fd, 1 << 20, SEEK_HOLE));
    said("hole at the beginning", lseek(fd, 0, SEEK_HOLE));
    said("data after the end", lseek(fd, 2 << 20, SEEK_DATA));
    printf("%lld blocks\n", blocks(fd));
    fill(fd, 'y', 0, 65536);
    worked("punch", fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 8192));
    char byte = 'z';
    said("read", pread(fd, &byte, 1, 5000));
    printf("%d\n", byte);
    said("hole", lseek(fd, 0, SEEK_HOLE));
    said("data", lseek(fd, 4096, SEEK_DATA));
    worked("keep size", fallocate(fd, FALLOC_FL_KEEP_SIZE, 2 << 20, 65536));
    said("size", lseek(fd, 0, SEEK_END));
    worked("allocate", fallocate(fd, 0, 2 << 20, 65536));
    said("size", lseek(fd, 0, SEEK_END));
    worked("zero", fallocate(fd, FALLOC_FL_ZERO_RANGE, 0, 4096));
    said("read", pread(fd, &byte, 1, 100));
    printf("%d\n", byte);
    worked("collapse", fallocate(fd, FALLOC_FL_COLLAPSE_RANGE, 0, 4096));
    said("size", lseek(fd, 0, SEEK_END));
    worked("insert", fallocate(fd, FALLOC_FL_INSERT_RANGE, 0, 4096));
    said("size", lseek(fd, 0, SEEK_END));
    worked("punch without keeping", fallocate(fd, FALLOC_FL_PUNCH_HOLE, 0, 4096));
    worked("negative", fallocate(fd, 0, -1, 10));
    worked("without length", fallocate(fd, 0, 0, 0));
    worked("posix_fallocate", -(errno = posix_fallocate(fd, 0, 8 << 20)));
    worked("shrink", ftruncate(fd, 1000));
    printf("%lld blocks\n", blocks(fd));
}

static void extents(void) {
    int fd = fresh("e"), flags = 0, version = 0;
    fill(fd, 'x', 0, 16384);
    fsync(fd);
    struct {
        struct fiemap map;
        struct fiemap_extent extents[4];
    } wanted = {.map = {.fm_length = ~0ul, .fm_extent_count = 4}};
    if (worked("FIEMAP", ioctl(fd, FS_IOC_FIEMAP, &wanted))) printf("%u extents\n", wanted.map.fm_mapped_extents);
    worked("FIBMAP", ioctl(fd, FIBMAP, &flags));
    worked("FS_IOC_GETFLAGS", ioctl(fd, FS_IOC_GETFLAGS, &flags));
    worked("FS_IOC_GETVERSION", ioctl(fd, FS_IOC_GETVERSION, &version));
    worked("FIGETBSZ", ioctl(fd, FIGETBSZ, &flags));
    printf("%d\n", flags);
    worked("TCGETS", ioctl(fd, 0x5401, &wanted));
}

static void leases(void) {
    int fd = fresh("l");
    said("none", fcntl(fd, F_GETLEASE));
    worked("write lease", fcntl(fd, F_SETLEASE, F_WRLCK));
    said("lease", fcntl(fd, F_GETLEASE));
    worked("read lease of a writer", fcntl(fd, F_SETLEASE, F_RDLCK));
    signal(SIGIO, SIG_IGN);
    said("open while leased", open("l", O_RDWR | O_NONBLOCK) < 0 ? -1 : 0);
    worked("unlock", fcntl(fd, F_SETLEASE, F_UNLCK));
    worked("notify", fcntl(open(".", O_RDONLY | O_DIRECTORY), F_NOTIFY, DN_CREATE));
}

// Runs a part in a child with the file opened anew.
static void other(const char *name, void (*part)(int fd)) {
    fflush(stdout);
    pid_t pid = fork();
    if (!pid) {
        part(open(name, O_RDWR | O_CLOEXEC));
        fflush(stdout);
        _exit(0);
    }
    waitpid(pid, NULL, 0);
}

static void try_locks(int fd) {
    struct flock whole = {.l_type = F_WRLCK}, part = {.l_type = F_RDLCK, .l_start = 100, .l_len = 10}, asked = {.l_type = F_WRLCK, .l_start = 5, .l_len = 1};
    worked("flock", flock(fd, LOCK_EX | LOCK_NB));
    worked("flock shared", flock(fd, LOCK_SH | LOCK_NB));
    worked("fcntl", fcntl(fd, F_SETLK, &whole));
    worked("fcntl part", fcntl(fd, F_SETLK, &part));
    worked("OFD", fcntl(fd, F_OFD_SETLK, &whole));
    if (worked("asked", fcntl(fd, F_GETLK, &asked))) printf("type %d, %s, %ld+%ld\n", asked.l_type, asked.l_pid == getppid() ? "the parent's" : asked.l_pid > 0 ? "another's" : "nobody's", (long)asked.l_start, (long)asked.l_len);
}

static void locks(void) {
    int fd = fresh("k");
    puts("free");
    other("k", try_locks);
    flock(fd, LOCK_EX);
    puts("flock");
    other("k", try_locks);
    flock(fd, LOCK_SH);
    puts("flock shared");
    other("k", try_locks);
    flock(fd, LOCK_UN);
    fcntl(fd, F_SETLK, &(struct flock){.l_type = F_WRLCK, .l_len = 50});
    puts("fcntl");
    other("k", try_locks);
    close(open("k", O_RDONLY));
    puts("fcntl after a close");
    other("k", try_locks);
    fcntl(fd, F_OFD_SETLK, &(struct flock){.l_type = F_WRLCK, .l_len = 50});
    puts("OFD");
    other("k", try_locks);
}

// lock FILE: whether somebody else has a lock; then its own, for as long as its input goes on.
static void lock(const char *name) {
    int fd = open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    worked("flock", flock(fd, LOCK_EX | LOCK_NB));
    worked("fcntl", fcntl(fd, F_SETLK, &(struct flock){.l_type = F_WRLCK}));
    fflush(stdout);
    for (char byte; read(0, &byte, 1) > 0;) continue;
}

static void renames(void) {
    close(fresh("r-a")), mkdir("r-b", 0755), close(fresh("r-c"));
    worked("no replace", renameat2(AT_FDCWD, "r-a", AT_FDCWD, "r-c", RENAME_NOREPLACE));
    worked("no replace, free", renameat2(AT_FDCWD, "r-c", AT_FDCWD, "r-d", RENAME_NOREPLACE));
    worked("exchange", renameat2(AT_FDCWD, "r-a", AT_FDCWD, "r-b", RENAME_EXCHANGE));
    struct stat a, b, c;
    worked("stat", stat("r-a", &a) | stat("r-b", &b));
    printf("%o %o\n", a.st_mode & S_IFMT, b.st_mode & S_IFMT);
    worked("exchange with nothing", renameat2(AT_FDCWD, "r-a", AT_FDCWD, "r-x", RENAME_EXCHANGE));
    if (worked("whiteout", renameat2(AT_FDCWD, "r-d", AT_FDCWD, "r-e", RENAME_WHITEOUT)) && worked("stat", lstat("r-d", &c)))
        printf("%o %lu\n", c.st_mode & S_IFMT, (unsigned long)c.st_rdev);
    worked("both", renameat2(AT_FDCWD, "r-a", AT_FDCWD, "r-b", RENAME_EXCHANGE | RENAME_NOREPLACE));
    worked("directory onto a file", rename("r-a", "r-b"));
    mkdir("r-full", 0755), close(fresh("r-full/file")), mkdir("r-dir", 0755);
    worked("onto a full directory", rename("r-dir", "r-full"));
    worked("into itself", rename("r-full", "r-full/below"));
    worked("another file system", rename("r-b", "/dev/shm/r-b"));
    worked("link of a directory", link("r-dir", "r-link"));
    worked("unlink of a directory", unlink("r-dir"));
    worked("rmdir of a full one", rmdir("r-full"));
    worked("rmdir of a file", rmdir("r-b"));
}

static void unlinked(void) {
    int fd = fresh("u"), second;
    fill(fd, 'x', 0, 5000);
    worked("unlink", unlink("u"));
    struct stat stat;
    if (worked("fstat", fstat(fd, &stat))) printf("%ld links, %ld bytes\n", (long)stat.st_nlink, (long)stat.st_size);
    fill(fd, 'y', 5000, 5000);
    worked("ftruncate", ftruncate(fd, 8000));
    worked("fchmod", fchmod(fd, 0600));
    char path[64], target[300] = "";
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    if (readlink(path, target, sizeof target - 1) > 0) puts(strrchr(target, '/'));
    worked("open again", second = open(path, O_RDWR));
    said("read", pread(second, target, 100, 7950));
    worked("link", linkat(AT_FDCWD, path, AT_FDCWD, "back", AT_SYMLINK_FOLLOW));
    mkdir("u-dir", 0755);
    int directory = open("u-dir", O_RDONLY | O_DIRECTORY);
    worked("rmdir", rmdir("u-dir"));
    worked("in a removed directory", openat(directory, "x", O_CREAT | O_RDWR, 0644));
    worked("fstat", fstat(directory, &stat));
    printf("%ld links\n", (long)stat.st_nlink);
    fd = fresh("over"), close(fresh("new"));
    fill(fd, 'o', 0, 10);
    worked("rename over", rename("new", "over"));
    said("read of what was there", pread(fd, target, 100, 0));
}

static void bus_error(int number) {
    (void)number;
    if (write(1, "SIGBUS\n", 7)) _exit(0);
}

static void behind_the_end(int fd) {
    signal(SIGBUS, bus_error);
    volatile char *map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    printf("%d\n", map[10]);
    fflush(stdout);
    printf("%d\n", map[5000]);
}

static void mapped_writer(int fd) {
    char *map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (map == MAP_FAILED) exit(!worked("mmap", -1));
    memcpy(map + 4096, "from the child", 15);
}

static void mappings(void) {
    int fd = fresh("m");
    worked("ftruncate", ftruncate(fd, 8192));
    char *map = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), text[20] = "";
    if (map == MAP_FAILED) exit(!worked("mmap", -1));
    strcpy(map, "mapped");
    said("read", pread(fd, text, 6, 0));
    puts(text);
    said("write", pwrite(fd, "written", 8, 100));
    puts(map + 100);
    other("m", mapped_writer);
    puts(map + 4096);
    worked("msync", msync(map, 8192, MS_SYNC));
    worked("truncate", ftruncate(fd, 100));
    other("m", behind_the_end);
    worked("grow", ftruncate(fd, 8192));
    printf("%d %d\n", map[99], map[4096]);
    int program = open("/bin/busybox", O_RDONLY);
    worked("mmap of a program", mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_PRIVATE, program, 0) == MAP_FAILED ? -1 : 0);
}

static void append(void) {
    close(fresh("a"));
    for (int writer = 0; writer < 4; writer++)
        if (!fork()) {
            int fd = open("a", O_WRONLY | O_APPEND);
            char line[33];
            memset(line, '0' + writer, sizeof line);
            line[32] = '\n';
            for (int count = 0; count < 100; count++)
                if (write(fd, line, sizeof line) != sizeof line) worked("write", -1);
            _exit(0);
        }
    while (wait(NULL) > 0) continue;
    FILE *file = fopen("a", "r");
    char line[100];
    int whole = 0, broken = 0;
    while (fgets(line, sizeof line, file)) {
        bool same = strlen(line) == 33;
        for (int at = 0; same && at < 32; at++) same = line[at] == line[0];
        same ? whole++ : broken++;
    }
    printf("%d whole, %d broken\n", whole, broken);
    int fd = open("a", O_RDWR | O_APPEND);
    said("pwrite appends", pwrite(fd, "x", 1, 0));
    said("size", lseek(fd, 0, SEEK_END));
}

static void direct(void) {
    int fd = open("d", O_RDWR | O_CREAT | O_DIRECT, 0644);
    if (!worked("O_DIRECT", fd)) return;
    char *buffer = aligned_alloc(4096, 65536), byte = 0;
    memset(buffer, 'd', 65536);
    said("write", pwrite(fd, buffer, 65536, 0));
    said("read", pread(fd, buffer, 8192, 4096));
    int cached = open("d", O_RDWR);
    said("cached write", pwrite(cached, "new", 3, 4096));
    said("read", pread(fd, buffer, 4096, 4096));
    printf("%.3s\n", buffer);
    memcpy(buffer, "direct", 6);
    said("write", pwrite(fd, buffer, 4096, 8192));
    said("cached read", pread(cached, &byte, 1, 8192));
    printf("%c\n", byte);
    said("size", lseek(fd, 0, SEEK_END));
}

// O_DIRECT with buffers and places that are not aligned.
static void unaligned(void) {
    int fd = open("d", O_RDWR | O_CREAT | O_DIRECT, 0644);
    char *buffer = aligned_alloc(4096, 65536);
    said("place", pwrite(fd, buffer, 4096, 1));
    said("length", pwrite(fd, buffer, 100, 0));
}

static void times(void) {
    int fd = fresh("t");
    static const struct {
        const char *name;
        struct timespec times[2];
    } all[] = {{"nanoseconds", {{1000000000, 123456789}, {1500000000, 987654321}}},
        {"before 1970", {{-1000, 5}, {-100000, 999999999}}},
        {"after 2106", {{5000000000, 1}, {5000000001, 2}}},
        {"one only", {{0, UTIME_OMIT}, {1600000000, 0}}}};
    for (size_t index = 0; index < COUNT(all); index++) {
        worked(all[index].name, futimens(fd, all[index].times));
        struct stat stat;
        fstat(fd, &stat);
        printf("%ld.%09ld %ld.%09ld\n", stat.st_atim.tv_sec, stat.st_atim.tv_nsec, stat.st_mtim.tv_sec, stat.st_mtim.tv_nsec);
    }
    worked("nonsense", futimens(fd, (struct timespec[]){{0, 1000000000}, {0, 0}}));
    if (symlink("t", "t-link")) worked("symlink", -1);
    worked("link itself", utimensat(AT_FDCWD, "t-link", (struct timespec[]){{1, 2}, {3, 4}}, AT_SYMLINK_NOFOLLOW));
    struct stat before, after;
    lstat("t-link", &before);
    printf("%ld.%09ld\n", before.st_mtim.tv_sec, before.st_mtim.tv_nsec);
    stat("t", &before);
    usleep(20000);
    fill(fd, 'x', 0, 10);
    stat("t", &after);
    printf("write: %d %d %d\n", after.st_mtime > before.st_mtime, after.st_ctim.tv_nsec != before.st_ctim.tv_nsec, after.st_atime == before.st_atime);
    char byte;
    stat("t", &before);
    said("read", pread(fd, &byte, 1, 0));
    stat("t", &after);
    printf("read: atime %s\n", after.st_atime > before.st_atime ? "moves" : "stays");
    struct statx found = {0};
    worked("statx", statx(fd, "", AT_EMPTY_PATH, STATX_BASIC_STATS | STATX_BTIME, &found));
    printf("%s %s, %ld\n", found.stx_mask & STATX_BASIC_STATS ? "basic" : "-", found.stx_mask & STATX_BTIME ? "birth" : "-", (long)(time(NULL) - found.stx_btime.tv_sec < 100));
}

// Deletes while listing: nothing is left, nothing told twice.
static void deleting(void) {
    char name[300];
    mkdir("many", 0755);
    for (int index = 0; index < 1000; index++) {
        snprintf(name, sizeof name, "many/a-file-with-a-name-%d", index);
        close(open(name, O_CREAT | O_RDWR, 0644));
    }
    DIR *directory = opendir("many");
    int removed = 0, twice = 0;
    for (struct dirent *entry; (entry = readdir(directory));)
        if (entry->d_name[0] != '.') unlinkat(dirfd(directory), entry->d_name, 0) ? twice++ : removed++;
    printf("%d removed, %d told twice\n", removed, twice);
    rewinddir(directory);
    int left = 0;
    while (readdir(directory)) left++;
    printf("%d left\n", left);
    worked("rmdir", rmdir("many"));
}

// Goes back in a listing to where it was.
static void seeking(void) {
    char name[300];
    mkdir("seek", 0755);
    for (int index = 0; index < 400; index++) {
        snprintf(name, sizeof name, "seek/%d", index);
        close(open(name, O_CREAT | O_RDWR, 0644));
    }
    DIR *directory = opendir("seek");
    long places[402] = {0};
    char names[402][16];
    int count = 0, same = 0;
    for (struct dirent *entry; count < 402; count++) {
        places[count] = telldir(directory);
        if (!(entry = readdir(directory))) break;
        snprintf(names[count], sizeof names[count], "%.15s", entry->d_name);
    }
    for (int index = count - 1; index >= 0; index -= 7) {
        seekdir(directory, places[index]);
        struct dirent *entry = readdir(directory);
        same += entry && !strcmp(entry->d_name, names[index]);
    }
    printf("%d entries, %d of %d places lead back\n", count, same, (count + 6) / 7);
}

static void mode_of(const char *name) {
    struct stat found;
    if (lstat(name, &found)) worked(name, -1);
    else printf("%s %o group %u\n", name, found.st_mode & 07777, found.st_gid);
}

// What is made in a set-group-id directory, by a user who is no member of the group.
static void set_group_id(void) {
    umask(0);
    mkdir("s", 0777), worked("chown", chown("s", 0, 50)), worked("chmod", chmod("s", 02777));
    if (syscall(SYS_setgroups, 0, NULL) || syscall(SYS_setgid, 1000) || syscall(SYS_setuid, 1000) || chdir("s")) worked("become a user", -1);
    close(open("file", O_CREAT | O_EXCL | O_WRONLY, 02775)), close(open("plain", O_CREAT | O_EXCL | O_WRONLY, 0664));
    close(open("not-executable", O_CREAT | O_EXCL | O_WRONLY, 02664)), close(open("suid", O_CREAT | O_EXCL | O_WRONLY, 04775));
    mkdir("dir", 0775), mknod("node", S_IFREG | 02775, 0), mkfifo("fifo", 02775);
    if (symlink("file", "link")) worked("symlink", -1);
    const char *names[] = {"file", "plain", "not-executable", "suid", "dir", "node", "fifo", "link"};
    for (size_t index = 0; index < COUNT(names); index++) mode_of(names[index]);
    worked("chmod", chmod("file", 02775));
    mode_of("file");
    worked("chown", chown("plain", -1, 1000));
    mode_of("plain");
}

// What takes set-id bits away from a user's program.
static void privileges(void) {
    const char *names[] = {"written", "truncated", "chowned", "mapped", "allocated", "renamed"};
    umask(0);
    for (size_t index = 0; index < COUNT(names); index++) {
        int fd = fresh(names[index]);
        fill(fd, 'x', 0, 8192);
        worked("chown", fchown(fd, 1000, 1000)), worked("chmod", fchmod(fd, 06775));
    }
    chmod(".", 0777);
    if (syscall(SYS_setgroups, 0, NULL) || syscall(SYS_setgid, 1000) || syscall(SYS_setuid, 1000)) worked("become a user", -1);
    said("write", write(open("written", O_WRONLY), "x", 1));
    worked("truncate", truncate("truncated", 10));
    worked("chown", chown("chowned", -1, 1000));
    worked("allocate", fallocate(open("allocated", O_WRONLY), 0, 0, 20000));
    worked("rename", rename("renamed", "moved"));
    names[5] = "moved";
    for (size_t index = 0; index < COUNT(names); index++) mode_of(names[index]);
    worked("give away", chown("moved", 0, -1));
    worked("another's", chmod("/bin/busybox", 0777));
}

// Sticky directories, and what is protected in those that everybody may write to.
static void sticky(void) {
    umask(0);
    mkdir("sticky", 0777), chmod("sticky", 01777), close(fresh("sticky/roots")), chmod("sticky/roots", 0666);
    worked("symlink", symlink("roots", "sticky/link"));
    mkfifo("sticky/fifo", 0666);
    if (syscall(SYS_setgroups, 0, NULL) || syscall(SYS_setgid, 1000) || syscall(SYS_setuid, 1000)) worked("become a user", -1);
    worked("write", open("sticky/roots", O_WRONLY));
    worked("write, creating", open("sticky/roots", O_WRONLY | O_CREAT, 0666));
    worked("FIFO, creating", open("sticky/fifo", O_RDWR | O_CREAT, 0666));
    worked("link", open("sticky/link", O_RDONLY));
    worked("unlink", unlink("sticky/roots"));
    worked("rename", rename("sticky/roots", "sticky/mine"));
    worked("hard link", link("sticky/roots", "sticky/second"));
    close(open("sticky/mine", O_CREAT | O_RDWR, 0600));
    worked("unlink one's own", unlink("sticky/mine"));
}

static void names(void) {
    static char name[5000];
    static const struct {
        const char *what;
        int length;
    } all[] = {{"255", 255}, {"256", 256}};
    for (size_t index = 0; index < COUNT(all); index++) {
        memset(name, 'n', all[index].length), name[all[index].length] = 0;
        worked(all[index].what, open(name, O_CREAT | O_RDWR, 0644));
        worked("directory", (unlink(name), mkdir(name, 0755)));
        worked("stat", access(name, F_OK));
        rmdir(name);
    }
    for (int length = 4094; length <= 4096; length++) {
        for (int at = 0; at < length; at += 2) name[at] = '.', name[at + 1] = '/';
        name[length] = 0;
        worked("path", access(name, F_OK));
        memset(name, 'l', length);
        worked("target", symlink(name, "long"));
        said("read", readlink("long", name, sizeof name));
        unlink("long");
    }
    // Deeper than any path.
    memset(name, 'd', 250), name[250] = 0;
    int depth = 0;
    while (depth < 20 && !mkdir(name, 0755) && !chdir(name)) depth++;
    printf("%d deep\n", depth);
    static char path[5000];
    said("getcwd", getcwd(path, sizeof path) ? 0 : -1);
    while (depth--) worked("back", chdir("..") | rmdir(name));
    worked("odd bytes", mkdir("a\n\xff\x01 b", 0755));
    worked("empty", open("", O_CREAT | O_RDWR, 0644));
    worked("through a file", (close(fresh("f")), open("f/x", O_RDONLY)));
    worked("directory for writing", open(".", O_RDWR));
    worked("O_DIRECTORY of a file", open("f", O_RDONLY | O_DIRECTORY));
    worked("O_NOFOLLOW", (symlink("f", "f-link"), open("f-link", O_RDONLY | O_NOFOLLOW)));
    worked("loop", (symlink("loop", "loop"), open("loop", O_RDONLY)));
}

// Extended attributes; FILE may be on any file system.
static void attributes(void) {
    int fd = fresh("x");
    static char value[70000], list[70000];
    const char *names[] = {"user.plain", "trusted.ours", "security.capability", "system.posix_acl_access", "system.posix_acl_default", "other.kind", "user."};
    for (size_t index = 0; index < COUNT(names); index++) {
        // A version 2 capability without any, which is sound; nonsense to the others.
        const unsigned char capability[20] = {0, 0, 0, 2};
        worked(names[index], fsetxattr(fd, names[index], capability, sizeof capability, 0));
        said("get", fgetxattr(fd, names[index], value, sizeof value));
    }
    worked("create again", fsetxattr(fd, "user.plain", "x", 1, XATTR_CREATE));
    worked("replace", fsetxattr(fd, "user.plain", "", 0, XATTR_REPLACE));
    worked("replace none", fsetxattr(fd, "user.none", "x", 1, XATTR_REPLACE));
    said("size", fgetxattr(fd, "user.plain", NULL, 0));
    worked("3000 bytes", fsetxattr(fd, "user.large", value, 3000, 0));
    said("too little room", fgetxattr(fd, "user.large", list, 100));
    worked("65537 bytes", fsetxattr(fd, "user.larger", value, 65537, 0));
    memset(list, 'n', 300), memcpy(list, "user.", 5), list[255] = 0;
    worked("long name", fsetxattr(fd, list, "x", 1, 0));
    list[255] = 'n', list[256] = 0;
    worked("longer name", fsetxattr(fd, list, "x", 1, 0));
    ssize_t length = flistxattr(fd, list, sizeof list);
    for (ssize_t at = 0; at < length; at += strlen(list + at) + 1)
        if (strncmp(list + at, "security.selinux", 16)) printf("%.30s\n", list + at);
    worked("remove", fremovexattr(fd, "user.plain"));
    worked("remove again", fremovexattr(fd, "user.plain"));
    if (symlink("x", "x-link")) worked("symlink", -1);
    worked("of a link", lsetxattr("x-link", "user.l", "x", 1, 0));
    mkfifo("x-fifo", 0644);
    worked("of a FIFO", setxattr("x-fifo", "user.f", "x", 1, 0));
    worked("of a directory", setxattr(".", "user.d", "x", 1, 0));
    said("get", getxattr(".", "user.d", value, sizeof value));
    removexattr(".", "user.d");
    // A change of owner or contents takes capabilities away.
    chown("x", 1, 1);
    said("capability after a chown", fgetxattr(fd, "security.capability", value, sizeof value));
}

// A list for user 1000 that has a right which neither owner nor group has.
static void access_lists(void) {
    int fd = fresh("acl");
    fill(fd, 'x', 0, 1);
    chmod(".", 0755), fchmod(fd, 0600);
    const struct {
        uint32_t version;
        struct {
            uint16_t tag, rights;
            uint32_t id;
        } entries[5];
    } list = {2, {{1, 6, -1}, {2, 6, 1000}, {4, 0, -1}, {16, 6, -1}, {32, 0, -1}}};
    worked("set", fsetxattr(fd, "system.posix_acl_access", &list, sizeof list, 0));
    mode_of("acl");
    if (syscall(SYS_setgroups, 0, NULL) || syscall(SYS_setgid, 1000) || syscall(SYS_setuid, 1000)) worked("become a user", -1);
    worked("open", open("acl", O_RDWR));
}

static void print_events(int queue) {
    char buffer[4096] __attribute__((aligned(8)));
    ssize_t length;
    while ((length = read(queue, buffer, sizeof buffer)) > 0)
        for (char *at = buffer; at < buffer + length;) {
            struct inotify_event *event = (void *)at;
            printf("%x %s\n", event->mask, event->len ? event->name : "");
            at += sizeof *event + event->len;
        }
}

// What a watch tells of changes in the container itself.
static void notify(void) {
    int queue = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    mkdir("n", 0755);
    worked("watch", inotify_add_watch(queue, "n", IN_ALL_EVENTS & ~IN_ACCESS));
    int fd = fresh("n/file");
    fill(fd, 'x', 0, 10), fchmod(fd, 0600), close(fd);
    rename("n/file", "n/renamed"), link("n/renamed", "n/second"), truncate("n/renamed", 1), unlink("n/second"), mkdir("n/dir", 0755), rmdir("n/dir");
    print_events(queue);
    unlink("n/renamed"), rmdir("n");
    print_events(queue);
}

// await FILE: an event in its directory within a second, and whether it is there at the end.
static void await(const char *name) {
    int queue = inotify_init1(IN_NONBLOCK | IN_CLOEXEC);
    inotify_add_watch(queue, ".", IN_CREATE | IN_MOVED_TO);
    close(fresh("ask")); // what the suite waits for, on the node
    double start = now();
    char buffer[4096];
    bool told = false;
    while (now() < start + 5 && access(name, F_OK)) usleep(20000);
    usleep(50000);
    for (ssize_t length; (length = read(queue, buffer, sizeof buffer)) > 0;)
        for (char *at = buffer; at < buffer + length; at += sizeof(struct inotify_event) + ((struct inotify_event *)at)->len)
            told |= ((struct inotify_event *)at)->len && !strcmp(((struct inotify_event *)at)->name, name);
    printf("%s, %s\n", access(name, F_OK) ? "not there" : "there", told ? "told" : "not told");
}

// open COUNT: so many files open at once.
static void many_open(int wanted) {
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    char name[32];
    int opened = 0, *fds = calloc(wanted, sizeof *fds);
    for (; opened < wanted; opened++) {
        snprintf(name, sizeof name, "o%d", opened);
        if ((fds[opened] = open(name, O_CREAT | O_RDWR | O_CLOEXEC, 0644)) < 0) {
            worked("open", -1);
            break;
        }
    }
    printf("%d open\n", opened);
    int right = 0, value;
    for (int index = 0; index < opened; index++)
        if (pwrite(fds[index], &index, sizeof index, 0) == sizeof index) right++;
    for (int index = 0; index < opened; index++)
        if (pread(fds[index], &value, sizeof value, 0) != sizeof value || value != index) right--;
    printf("%d right\n", right);
    for (int index = 0; index < opened; index++) snprintf(name, sizeof name, "o%d", index), unlink(name);
}

// make COUNT: so many empty files in a hundred directories; then all of them looked at.
static void make(int wanted) {
    char name[64];
    int made = 0, seen = 0;
    for (int index = 0; index < wanted; index++) {
        if (index % 1000 == 0) snprintf(name, sizeof name, "d%d", index / 1000), mkdir(name, 0755);
        snprintf(name, sizeof name, "d%d/f%d", index / 1000, index % 1000);
        made += mknod(name, S_IFREG | 0644, 0) == 0;
    }
    printf("%d made\n", made);
    struct stat stat;
    for (int index = 0; index < wanted; index++) {
        snprintf(name, sizeof name, "d%d/f%d", index / 1000, index % 1000);
        seen += lstat(name, &stat) == 0;
    }
    printf("%d seen\n", seen);
}

static void sockets(void) {
    struct sockaddr_un address = {.sun_family = AF_UNIX, .sun_path = "socket"};
    int listener = socket(AF_UNIX, SOCK_STREAM, 0), client = socket(AF_UNIX, SOCK_STREAM, 0);
    worked("bind", bind(listener, (void *)&address, sizeof address));
    worked("bind again", bind(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&address, sizeof address));
    worked("listen", listen(listener, 1));
    worked("connect", connect(client, (void *)&address, sizeof address));
    int server = accept(listener, NULL, NULL);
    struct ucred peer = {0};
    worked("peer", getsockopt(server, SOL_SOCKET, SO_PEERCRED, &peer, &(socklen_t){sizeof peer}));
    printf("%d %u %u\n", peer.pid == getpid(), peer.uid, peer.gid);
    mode_of("socket");
    worked("open", open("socket", O_RDWR));
    close(listener);
    worked("connect without a listener", connect(socket(AF_UNIX, SOCK_STREAM, 0), (void *)&address, sizeof address));
    worked("unlink", unlink("socket"));
}

// numbers PATH...: whether inode and device numbers suit programs whose numbers have 32 bits, and are those of listings.
static void numbers(int count, char **paths) {
    for (int index = 0; index < count; index++) {
        struct stat found;
        if (lstat(paths[index], &found)) worked(paths[index], -1);
        else printf("%s %s\n", paths[index], found.st_ino >> 32 ? "more than 32 bits" : "32 bits");
    }
}

// room PATH...: kinds of file systems, and how they are measured.
static void room(int count, char **paths) {
    for (int index = 0; index < count; index++) {
        struct statfs found;
        if (statfs(paths[index], &found)) worked(paths[index], -1);
        else printf("%s type %lx block %ld/%ld names %ld flags %lx %s\n", paths[index], (long)found.f_type, (long)found.f_bsize, (long)found.f_frsize,
            (long)found.f_namelen, (long)found.f_flags & ~0x20L, found.f_blocks ? "with room" : "without room");
    }
}

static int probe(int argc, char **argv) {
    const struct {
        const char *name;
        void (*run)(void);
    } all[] = {{"kinds", kinds}, {"temporary", temporary}, {"copies", copies}, {"holes", holes}, {"extents", extents}, {"leases", leases},
        {"locks", locks}, {"renames", renames}, {"unlinked", unlinked}, {"mappings", mappings}, {"append", append}, {"direct", direct},
        {"unaligned", unaligned}, {"times", times}, {"deleting", deleting}, {"seeking", seeking}, {"set-group-id", set_group_id},
        {"privileges", privileges}, {"sticky", sticky}, {"names", names}, {"attributes", attributes}, {"access-lists", access_lists},
        {"notify", notify}, {"sockets", sockets}};
    const char *name = argc > 1 ? argv[1] : "", *argument = argc > 2 ? argv[2] : "";
    alarm(20);
    if (!strcmp(name, "numbers")) numbers(argc - 2, argv + 2);
    else if (!strcmp(name, "room")) room(argc - 2, argv + 2);
    else if (!strcmp(name, "await")) await(argument);
    else if (!strcmp(name, "lock")) lock(argument);
    else if (!strcmp(name, "open")) many_open(atoi(argument));
    else if (!strcmp(name, "make")) make(atoi(argument));
    else {
        for (size_t index = 0; index < COUNT(all); index++)
            if (!strcmp(name, all[index].name)) {
                all[index].run();
                exit(0);
            }
        fprintf(stderr, "probe: no %s\n", name);
        exit(2);
    }
    exit(0);
}

const struct attack probe_attacks[] = {{"probe", probe}, {0}};
