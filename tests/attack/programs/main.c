// attack NAME [ARG...]: one attempt out of a container. Built statically, put into the test image by tests/attack/build.sh.
#include "attack.h"

static unsigned tried, succeeded;
static char names[1500];

void note(bool worked, const char *format, ...) {
    tried++;
    if (!worked) return;
    succeeded++;
    size_t used = strlen(names);
    if (used + 80 > sizeof names) return;
    names[used++] = ' ';
    va_list list;
    va_start(list, format);
    vsnprintf(names + used, 70, format, list);
    va_end(list);
}

double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

bool put(const char *path, const char *text) {
    int fd = open(path, O_WRONLY | O_CREAT | O_CLOEXEC, 0755);
    if (fd < 0) return false;
    ssize_t length = strlen(text);
    bool all = write(fd, text, length) == length;
    return close(fd) == 0 && all;
}

int main(int argc, char **argv) {
    const struct attack *tables[] = {modules_attacks, files_attacks, machine_attacks, exhaust_attacks, probe_attacks};
    signal(SIGPIPE, SIG_IGN);
    for (size_t table = 0; argc > 1 && table < COUNT(tables); table++)
        for (const struct attack *attack = tables[table]; attack->name; attack++)
            if (!strcmp(attack->name, argv[1])) {
                int code = attack->run(argc - 1, argv + 1);
                printf("%s: %u of %u worked:%s\n", argv[1], succeeded, tried, names);
                return code;
            }
    fprintf(stderr, "attack: no attempt of that name\n");
    return 2;
}
