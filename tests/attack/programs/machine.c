// The machine: memory, ports, registers, devices, and ways to end it.
#include "attack.h"
#include <linux/kexec.h>
#include <linux/reboot.h>
#include <linux/vm_sockets.h>
#include <sys/io.h>
#include <sys/ptrace.h>
#include <sys/timex.h>

static uint64_t state = 88172645463325252;
static uint64_t any(void) {
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

// memory: physical memory and the windows of devices in it.
static int memory(int argc, char **argv) {
    (void)argc, (void)argv;
    const char *paths[] = {"/dev/mem", "/dev/kmem", "/dev/port", "/proc/kcore", "/dev/own-mem"};
    mknod("/dev/own-mem", S_IFCHR | 0600, makedev(1, 1));
    for (size_t index = 0; index < COUNT(paths); index++) {
        int fd = open(paths[index], O_RDWR | O_SYNC | O_CLOEXEC);
        note(fd >= 0, "%s", paths[index]);
        if (fd < 0) continue;
        for (uint64_t address = 0; address < 1 << 20; address += 65536) {
            char byte;
            note(pread(fd, &byte, 1, address) == 1, "read %llx", (unsigned long long)address);
        }
        for (int window = 0; window < 16; window++) {
            volatile uint32_t *registers = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0xd0000000 + 4096 * window);
            note(registers != MAP_FAILED, "window %d", window);
            for (int count = 0; registers != MAP_FAILED && count < 300; count++) {
                uint32_t offset = any() % 160;
                if (any() % 2) registers[offset] = any() >> (any() % 64);
                else (void)registers[offset];
            }
        }
        close(fd);
    }
    return 0;
}

// ports: every port read and written, those last that end the machine.
static int ports(int argc, char **argv) {
    (void)argc, (void)argv;
    note(iopl(3) == 0, "iopl");
    bool allowed = ioperm(0, 65536, 1) == 0 || iopl(3) == 0;
    note(allowed, "ioperm");
    if (!allowed) return 0;
    for (uint32_t port = 0; port < 65536; port += port < 0x700 ? 1 : 257) {
        if (port == 0x64 || port == 0x604) continue;
        (void)inb(port), (void)inl(port);
        outb(any(), port), outw(any(), port), outl(any(), port);
    }
    char bytes[512] = {0};
    insb(0x3f8, bytes, sizeof bytes);
    outsb(0x3f8, bytes, sizeof bytes);
    for (int count = 0; count < 2000; count++) outb(count, 0x64 + (count & 1 ? 0 : 4));
    outb(0xfe, 0x64), outl(0x34, 0x604);
    return 0;
}

// registers: model specific registers.
static int registers(int argc, char **argv) {
    (void)argc, (void)argv;
    const uint32_t numbers[] = {0x10, 0x1b, 0x3a, 0x48, 0x49, 0x8b, 0xc0000080, 0xc0000082, 0xc0010015, 0xc0011020, 0x4b564d00, 0x4b564d02, 0x40000000, 0x40000073};
    mkdir("/dev/cpu", 0755), mkdir("/dev/cpu/0", 0755), mknod("/dev/cpu/0/msr", S_IFCHR | 0600, makedev(202, 0));
    int fd = open("/dev/cpu/0/msr", O_RDWR | O_CLOEXEC);
    note(fd >= 0, "msr device");
    for (size_t index = 0; fd >= 0 && index < COUNT(numbers); index++) {
        uint64_t value = any();
        note(pwrite(fd, &value, 8, numbers[index]) == 8, "%x", numbers[index]);
    }
    return 0;
}

// instructions: what KVM has to handle, out of user mode; each in a process of its own.
static int instructions(int argc, char **argv) {
    (void)argc, (void)argv;
    static const unsigned char codes[][8] = {{0x0f, 0x01, 0xc1}, {0x0f, 0x01, 0xd9}, {0x0f, 0x01, 0xd8}, {0x0f, 0x01, 0xda}, {0x0f, 0x01, 0xc8}, {0x0f, 0x01, 0xd1}, {0x0f, 0x01, 0xf9}, {0x0f, 0x30}, {0x0f, 0x32},
        {0x0f, 0x33}, {0xf4}, {0xfa}, {0x0f, 0x08}, {0x0f, 0x09}, {0x0f, 0x20, 0xc0}, {0x0f, 0x21, 0xc0}, {0x0f, 0x22, 0xe0}, {0xcd, 0x02}, {0xcd, 0x80}, {0xf1}, {0xcc}, {0x0f, 0x0b}, {0x0f, 0xaa}, {0x0f, 0xa2},
        {0x0f, 0x01, 0x00}, {0x0f, 0x01, 0x10}, {0x0f, 0x00, 0x00}, {0x0f, 0xc7, 0xf0}, {0x66, 0x0f, 0x38, 0x82, 0x00}, {0x62, 0xf1}, {0xc5, 0xf8, 0x77}, {0x0f, 0x37}};
    for (size_t index = 0; index < COUNT(codes); index++) {
        pid_t child = fork();
        if (child == 0) {
            unsigned char *code = mmap(NULL, 4096, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            if (code == MAP_FAILED) _exit(1);
            memcpy(code, codes[index], 8);
            size_t length = 8;
            while (length > 1 && !codes[index][length - 1]) length--;
            code[length] = 0xc3;
            alarm(1);
            for (int count = 0; count < 200; count++) __asm__ volatile("call *%0" ::"r"(code), "a"(code + 2048), "c"(0), "d"(0), "b"(0) : "memory", "rsi", "rdi", "r8", "r9", "r10", "r11");
            _exit(0);
        }
        int status = 1;
        if (child > 0) waitpid(child, &status, 0);
        note(status == 0, "%02x%02x%02x", codes[index][0], codes[index][1], codes[index][2]);
    }
    // Locks across two cache lines stop the whole machine's bus.
    static char lines[256] __attribute__((aligned(64)));
    uint64_t *split = (void *)(lines + 60);
    for (double start = now(); now() < start + 0.05;) __sync_fetch_and_add(split, 1);
    return 0;
}

// drivers: every driver taken off its device and put back, while the devices are used.
static int drivers(int argc, char **argv) {
    (void)argc, (void)argv;
    return system("mount -o remount,rw /sys 2>/dev/null; cd /sys/bus/virtio/drivers 2>/dev/null || exit 0; for round in 1 2 3; do for driver in virtio_rng virtio_net vmw_vsock_virtio_transport virtio_console virtiofs virtio_blk; do "
                  "for device in $driver/virtio*; do [ -e $device ] || continue; name=${device##*/}; (echo $name >$driver/unbind; echo $name >$driver/bind) 2>/dev/null && echo $driver; done; done; done; "
                  "cd /sys/bus/platform/drivers/virtio-mmio && for device in *.virtio-mmio.* virtio-mmio.*; do [ -e $device ] && (echo $device >unbind) 2>/dev/null; done; sleep 0.2") != 0;
}

// entropy SECONDS: the entropy device, drained.
static int entropy(int argc, char **argv) {
    double length = argc > 1 ? atof(argv[1]) : 0.2;
    mknod("/dev/own-hwrng", S_IFCHR | 0600, makedev(10, 183));
    int fd = open("/dev/hwrng", O_RDONLY | O_CLOEXEC);
    if (fd < 0) fd = open("/dev/own-hwrng", O_RDONLY | O_CLOEXEC);
    static char buffer[1 << 16];
    size_t total = 0;
    for (double start = now(); fd >= 0 && now() < start + length;) {
        ssize_t count = read(fd, buffer, sizeof buffer);
        if (count <= 0) break;
        total += count;
    }
    note(total > 0, "%zu bytes", total);
    return 0;
}

// vsock-ports: the host's ports, and those of other machines.
static int vsock_ports(int argc, char **argv) {
    (void)argc, (void)argv;
    const unsigned cids[] = {VMADDR_CID_HOST, VMADDR_CID_HYPERVISOR, VMADDR_CID_LOCAL, 3, 4, 77};
    for (size_t cid = 0; cid < COUNT(cids); cid++)
        for (unsigned port = 0; port < 40; port++) {
            unsigned tried = port < 20 ? port : port < 30 ? 1000 + port : (unsigned)any();
            struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = cids[cid], .svm_port = tried};
            int fd = socket(AF_VSOCK, port & 1 ? SOCK_SEQPACKET : SOCK_STREAM, 0);
            struct timeval limit = {.tv_usec = 20000};
            if (fd >= 0) setsockopt(fd, AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, &limit, sizeof limit);
            note(fd >= 0 && connect(fd, (void *)&address, sizeof address) == 0, "%u:%u", cids[cid], tried);
            if (fd >= 0) close(fd);
        }
    return 0;
}

// vsock-flood: connections begun and never finished, as many as there are descriptors, again and again.
static int vsock_flood(int argc, char **argv) {
    (void)argc, (void)argv;
    unsigned begun = 0;
    for (double start = now(); now() < start + 0.5;) {
        int fds[900];
        for (size_t index = 0; index < COUNT(fds); index++) {
            struct sockaddr_vm address = {.svm_family = AF_VSOCK, .svm_cid = VMADDR_CID_HOST, .svm_port = any()};
            fds[index] = socket(AF_VSOCK, SOCK_STREAM | SOCK_NONBLOCK, 0);
            if (fds[index] >= 0 && connect(fds[index], (void *)&address, sizeof address) && errno == EINPROGRESS) begun++;
        }
        for (size_t index = 0; index < COUNT(fds); index++)
            if (fds[index] >= 0) close(fds[index]);
    }
    note(begun > 0, "%u begun", begun);
    return 0;
}

static int end_machine(int argc, char **argv) {
    (void)argc, (void)argv;
    const unsigned commands[] = {LINUX_REBOOT_CMD_CAD_ON, LINUX_REBOOT_CMD_SW_SUSPEND, LINUX_REBOOT_CMD_KEXEC, LINUX_REBOOT_CMD_HALT, LINUX_REBOOT_CMD_POWER_OFF, LINUX_REBOOT_CMD_RESTART};
    for (size_t index = 0; index < COUNT(commands); index++)
        note(syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, commands[index], "") == 0, "%x", commands[index]);
    return 0;
}

static int kexec(int argc, char **argv) {
    (void)argc, (void)argv;
    static char code[4096];
    struct kexec_segment segment = {.buf = code, .bufsz = sizeof code, .mem = (void *)0x100000, .memsz = sizeof code};
    note(syscall(SYS_kexec_load, 0x100000, 1, &segment, KEXEC_ARCH_DEFAULT) == 0, "kexec_load");
    int fd = open("/proc/self/exe", O_RDONLY | O_CLOEXEC);
    note(syscall(SYS_kexec_file_load, fd, -1, 1, "", 0x4) == 0, "kexec_file_load");
    note(syscall(SYS_reboot, LINUX_REBOOT_MAGIC1, LINUX_REBOOT_MAGIC2, LINUX_REBOOT_CMD_KEXEC, "") == 0, "reboot");
    return 0;
}

static int set_clock(int argc, char **argv) {
    (void)argc, (void)argv;
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    time.tv_sec += 7200;
    note(clock_settime(CLOCK_REALTIME, &time) == 0, "clock_settime");
    struct timex adjust = {.modes = ADJ_FREQUENCY | ADJ_TICK, .freq = 30000000, .tick = 9000};
    note(adjtimex(&adjust) >= 0, "adjtimex");
    return 0;
}

// spoil PID: a process's memory overwritten with breakpoints.
static int spoil(int argc, char **argv) {
    char path[64], line[512];
    int pid = argc > 1 ? atoi(argv[1]) : 1;
    snprintf(path, sizeof path, "/proc/%d/mem", pid);
    int memory = open(path, O_RDWR | O_CLOEXEC);
    note(memory >= 0, "open");
    snprintf(path, sizeof path, "/proc/%d/maps", pid);
    FILE *maps = fopen(path, "re");
    while (memory >= 0 && maps && fgets(line, sizeof line, maps)) {
        unsigned long from, to;
        char flags[5];
        if (sscanf(line, "%lx-%lx %4s", &from, &to, flags) != 3 || flags[2] != 'x') continue;
        char breakpoints[4096];
        memset(breakpoints, 0xcc, sizeof breakpoints);
        for (; from < to; from += sizeof breakpoints) note(pwrite(memory, breakpoints, sizeof breakpoints, from) > 0, "%lx", from);
    }
    note(ptrace(PTRACE_ATTACH, pid, 0, 0) == 0, "ptrace");
    kill(pid, SIGSTOP);
    sleep(1);
    return 0;
}

const struct attack machine_attacks[] = {{"memory", memory}, {"ports", ports}, {"registers", registers}, {"instructions", instructions}, {"drivers", drivers}, {"entropy", entropy},
    {"vsock-ports", vsock_ports}, {"vsock-flood", vsock_flood}, {"reboot", end_machine}, {"kexec", kexec}, {"clock", set_clock}, {"spoil", spoil}, {NULL, NULL}};
