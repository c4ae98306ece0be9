// What makes a kernel load a module by itself, and the calls that load one.
#include "attack.h"
#include <linux/genetlink.h>
#include <linux/if_alg.h>
#include <linux/if_link.h>
#include <linux/netlink.h>
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <termios.h>

static int socket_families(int argc, char **argv) {
    (void)argc, (void)argv;
    const int types[] = {SOCK_DGRAM, SOCK_SEQPACKET};
    for (int family = 0; family < 46; family++)
        for (size_t type = 0; type < COUNT(types); type++) {
            int fd = socket(family, types[type], 0);
            note(fd >= 0, "%d", family);
            if (fd >= 0) close(fd);
        }
    return 0;
}

static int inet_protocols(int argc, char **argv) {
    (void)argc, (void)argv;
    // DCCP, SCTP, UDP-Lite, L2TP, MPTCP, SMC.
    const int protocols[] = {33, 132, 136, 115, 262, 256}, types[] = {SOCK_STREAM, SOCK_DGRAM, SOCK_SEQPACKET, SOCK_DCCP};
    const int families[] = {AF_INET, AF_INET6};
    for (size_t family = 0; family < COUNT(families); family++)
        for (size_t protocol = 0; protocol < COUNT(protocols); protocol++)
            for (size_t type = 0; type < COUNT(types); type++) {
                int fd = socket(families[family], types[type], protocols[protocol]);
                note(fd >= 0, "%d/%d", protocols[protocol], types[type]);
                if (fd >= 0) close(fd);
            }
    return 0;
}

static int netlink_protocols(int argc, char **argv) {
    (void)argc, (void)argv;
    for (int protocol = 0; protocol < 32; protocol++) {
        int fd = socket(AF_NETLINK, SOCK_RAW, protocol);
        note(fd >= 0, "%d", protocol);
        if (fd >= 0) close(fd);
    }
    return 0;
}

// A netlink request under construction.
struct request {
    struct nlmsghdr header;
    char body[512];
};

static void *append(struct request *request, int type, const void *data, size_t length) {
    struct rtattr *attribute = (void *)((char *)request + NLMSG_ALIGN(request->header.nlmsg_len));
    attribute->rta_type = type;
    attribute->rta_len = RTA_LENGTH(length);
    if (length) memcpy(RTA_DATA(attribute), data, length);
    request->header.nlmsg_len = NLMSG_ALIGN(request->header.nlmsg_len) + RTA_ALIGN(attribute->rta_len);
    return attribute;
}

// Sends a request and returns the kernel's error number, 0 for none.
static int ask(int fd, struct request *request) {
    char answer[4096];
    request->header.nlmsg_flags |= NLM_F_REQUEST | NLM_F_ACK;
    if (send(fd, request, request->header.nlmsg_len, 0) < 0) return errno;
    if (recv(fd, answer, sizeof answer, 0) < (ssize_t)NLMSG_LENGTH(sizeof(struct nlmsgerr))) return EIO;
    struct nlmsghdr *header = (void *)answer;
    return header->nlmsg_type == NLMSG_ERROR ? -((struct nlmsgerr *)NLMSG_DATA(header))->error : 0;
}

static int generic_netlink(int argc, char **argv) {
    (void)argc, (void)argv;
    const char *families[] = {"wireguard", "macsec", "gtp", "l2tp", "nl80211", "ovs_datapath", "tipc", "batadv", "nbd", "fou", "seg6", "team"};
    int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_GENERIC);
    for (size_t index = 0; fd >= 0 && index < COUNT(families); index++) {
        struct request request = {.header = {.nlmsg_len = NLMSG_LENGTH(sizeof(struct genlmsghdr)), .nlmsg_type = GENL_ID_CTRL}};
        struct genlmsghdr generic = {.cmd = CTRL_CMD_GETFAMILY, .version = 1};
        memcpy(request.body, &generic, sizeof generic);
        append(&request, CTRL_ATTR_FAMILY_NAME, families[index], strlen(families[index]) + 1);
        note(ask(fd, &request) == 0, "%s", families[index]);
    }
    return 0;
}

static int file_systems(int argc, char **argv) {
    (void)argc, (void)argv;
    const char *types[] = {"xfs", "btrfs", "nfs", "cifs", "ceph", "udf", "iso9660", "vfat", "ntfs3", "hfsplus", "jffs2", "f2fs", "9p", "virtiofs", "afs", "coda", "ocfs2", "gfs2", "zonefs", "made-up"};
    mkdir("/tmp/mnt", 0755);
    for (size_t index = 0; index < COUNT(types); index++) {
        bool worked = mount("none", "/tmp/mnt", types[index], 0, NULL) == 0;
        note(worked, "%s", types[index]);
        if (worked) umount("/tmp/mnt");
        int fd = syscall(SYS_fsopen, types[index], 0);
        note(fd >= 0, "fsopen:%s", types[index]);
        if (fd >= 0) close(fd);
    }
    return 0;
}

static int binary_formats(int argc, char **argv) {
    (void)argc, (void)argv;
    for (unsigned char first = 0x80; first < 0x88; first++) {
        const char *path = "/tmp/format";
        unsigned char bytes[128] = {first, 1, first, 2, 0xff};
        int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0755);
        if (fd < 0) continue;
        bool written = write(fd, bytes, sizeof bytes) == sizeof bytes;
        close(fd);
        pid_t child = written ? fork() : -1;
        if (child == 0) {
            execl(path, path, (char *)NULL);
            _exit(errno == ENOEXEC ? 1 : 2);
        }
        int status = 1;
        if (child > 0) waitpid(child, &status, 0);
        note(status == 0, "%02x", first);
    }
    return 0;
}

static int device_kinds(int argc, char **argv) {
    (void)argc, (void)argv;
    const char *kinds[] = {"dummy", "macvlan", "ipvlan", "bond", "team", "vxlan", "geneve", "wireguard", "gre", "sit", "ip6tnl", "vcan", "ifb", "nlmon", "hsr", "batadv", "made-up"};
    int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
    for (size_t index = 0; fd >= 0 && index < COUNT(kinds); index++) {
        struct request request = {.header = {.nlmsg_len = NLMSG_LENGTH(sizeof(struct ifinfomsg)), .nlmsg_type = RTM_NEWLINK, .nlmsg_flags = NLM_F_CREATE | NLM_F_EXCL}};
        struct rtattr *info = append(&request, IFLA_LINKINFO, NULL, 0);
        append(&request, IFLA_INFO_KIND, kinds[index], strlen(kinds[index]));
        info->rta_len = (char *)&request + request.header.nlmsg_len - (char *)info;
        note(ask(fd, &request) == 0, "%s", kinds[index]);
    }
    return 0;
}

static int traffic_control(int argc, char **argv) {
    (void)argc, (void)argv;
    const char *kinds[] = {"htb", "netem", "tbf", "sfq", "cake", "red", "hfsc", "ets", "drr", "plug", "made-up"};
    int fd = socket(AF_NETLINK, SOCK_RAW, NETLINK_ROUTE);
    for (size_t index = 0; fd >= 0 && index < COUNT(kinds); index++) {
        struct request request = {.header = {.nlmsg_len = NLMSG_LENGTH(sizeof(struct tcmsg)), .nlmsg_type = RTM_NEWQDISC, .nlmsg_flags = NLM_F_CREATE | NLM_F_REPLACE}};
        struct tcmsg message = {.tcm_ifindex = 1, .tcm_parent = TC_H_ROOT};
        memcpy(request.body, &message, sizeof message);
        append(&request, TCA_KIND, kinds[index], strlen(kinds[index]) + 1);
        note(ask(fd, &request) == 0, "%s", kinds[index]);
    }
    return 0;
}

static int crypto(int argc, char **argv) {
    (void)argc, (void)argv;
    const char *algorithms[][2] = {{"hash", "md4"}, {"hash", "rmd160"}, {"hash", "wp512"}, {"skcipher", "cbc(serpent)"}, {"skcipher", "xts(twofish)"}, {"skcipher", "ecb(cast6)"},
        {"aead", "gcm(camellia)"}, {"aead", "rfc7539(chacha20,poly1305)"}, {"rng", "ansi_cprng"}, {"akcipher", "rsa"}, {"hash", "made-up"}};
    for (size_t index = 0; index < COUNT(algorithms); index++) {
        struct sockaddr_alg address = {.salg_family = AF_ALG};
        strcpy((char *)address.salg_type, algorithms[index][0]);
        strcpy((char *)address.salg_name, algorithms[index][1]);
        int fd = socket(AF_ALG, SOCK_SEQPACKET, 0);
        note(fd >= 0 && bind(fd, (void *)&address, sizeof address) == 0, "%s", algorithms[index][1]);
        if (fd >= 0) close(fd);
    }
    return 0;
}

static int line_disciplines(int argc, char **argv) {
    (void)argc, (void)argv;
    int fd = open("/dev/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC);
    for (int discipline = 1; discipline < 31; discipline++) note(fd >= 0 && ioctl(fd, TIOCSETD, &discipline) == 0, "%d", discipline);
    return 0;
}

static int device_numbers(int argc, char **argv) {
    (void)argc, (void)argv;
    const int characters[] = {6, 9, 14, 21, 81, 90, 99, 108, 116, 171, 180, 195}, blocks[] = {2, 3, 9, 11, 43, 44, 93, 179, 252};
    for (int block = 0; block < 2; block++)
        for (size_t index = 0; index < (block ? COUNT(blocks) : COUNT(characters)); index++) {
            int major = block ? blocks[index] : characters[index];
            const char *path = "/dev/own-device";
            unlink(path);
            if (mknod(path, (block ? S_IFBLK : S_IFCHR) | 0600, makedev(major, 0))) {
                note(false, "mknod");
                continue;
            }
            int fd = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC);
            note(fd >= 0, "%s%d", block ? "b" : "c", major);
            if (fd >= 0) close(fd);
        }
    unlink("/dev/own-device");
    return 0;
}

static int interface_names(int argc, char **argv) {
    (void)argc, (void)argv;
    const char *names[] = {"dummy0", "tunl0", "gre0", "sit0", "ip6tnl0", "ip_vti0", "teql0", "bond0", "made-up0"};
    int fd = socket(AF_INET, SOCK_DGRAM, 0);
    for (size_t index = 0; fd >= 0 && index < COUNT(names); index++) {
        struct ifreq request = {0};
        strcpy(request.ifr_name, names[index]);
        note(ioctl(fd, SIOCGIFFLAGS, &request) == 0, "%s", names[index]);
    }
    return 0;
}

static int tcp_modules(int argc, char **argv) {
    (void)argc, (void)argv;
    const char *names[] = {"bbr", "vegas", "westwood", "dctcp", "htcp", "hybla", "made-up"}, *layers[] = {"tls", "espintcp", "smc"};
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    for (size_t index = 0; index < COUNT(names); index++) note(setsockopt(fd, IPPROTO_TCP, TCP_CONGESTION, names[index], strlen(names[index])) == 0, "%s", names[index]);
    for (size_t index = 0; index < COUNT(layers); index++) note(setsockopt(fd, IPPROTO_TCP, TCP_ULP, layers[index], strlen(layers[index])) == 0, "%s", layers[index]);
    return 0;
}

static int packet_filters(int argc, char **argv) {
    (void)argc, (void)argv;
    const char *tables[] = {"filter", "nat", "mangle", "raw", "security"};
    const int families[] = {AF_INET, AF_INET6};
    for (size_t family = 0; family < COUNT(families); family++) {
        int fd = socket(families[family], SOCK_RAW, IPPROTO_RAW);
        for (size_t index = 0; index < COUNT(tables); index++) {
            char buffer[84] = {0}; // struct ipt_getinfo: the table's name first
            socklen_t length = sizeof buffer;
            strcpy(buffer, tables[index]);
            note(getsockopt(fd, families[family] == AF_INET ? IPPROTO_IP : IPPROTO_IPV6, 64, buffer, &length) == 0, "%s", tables[index]);
        }
    }
    // xt_request_find_match by way of NFT_COMPAT needs nfnetlink.
    note(socket(AF_NETLINK, SOCK_RAW, NETLINK_NETFILTER) >= 0, "nfnetlink");
    return 0;
}

// A module's file, if there is one, as it is and by its bytes; then taking one out.
static int load_module(int argc, char **argv) {
    int fd = open(argc > 1 ? argv[1] : "/nothing", O_RDONLY | O_CLOEXEC);
    bool loaded = fd >= 0 && syscall(SYS_finit_module, fd, "", 0) == 0;
    note(loaded, "finit_module");
    struct stat status;
    if (!loaded && fd >= 0 && fstat(fd, &status) == 0) {
        void *bytes = mmap(NULL, status.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
        note(bytes != MAP_FAILED && syscall(SYS_init_module, bytes, status.st_size, "") == 0, "init_module");
    } else {
        char nothing[64] = "\177ELF";
        note(syscall(SYS_init_module, nothing, sizeof nothing, "") == 0, "init_module");
    }
    printf("(%s) ", strerror(errno));
    note(syscall(SYS_delete_module, "made_up", O_NONBLOCK) == 0, "delete_module");
    return 0;
}

const struct attack modules_attacks[] = {{"socket-families", socket_families}, {"inet-protocols", inet_protocols}, {"netlink-protocols", netlink_protocols},
    {"generic-netlink", generic_netlink}, {"file-systems", file_systems}, {"binary-formats", binary_formats}, {"device-kinds", device_kinds},
    {"traffic-control", traffic_control}, {"crypto", crypto}, {"line-disciplines", line_disciplines}, {"device-numbers", device_numbers},
    {"interface-names", interface_names}, {"tcp-modules", tcp_modules}, {"packet-filters", packet_filters}, {"load-module", load_module}, {NULL, NULL}};
