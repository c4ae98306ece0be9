/*
 * Proves that /dev/kvm works: makes a VM with one vCPU whose guest counts to a million in real mode and halts, and prints
 * the rate. Hardware-style KVM does hundreds of millions of instructions a second, an emulating one about a million.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

static int check(const char *what, int result)
{
	if (result < 0) {
		perror(what);
		exit(1);
	}
	return result;
}

int main(void)
{
	/* mov ecx, 1000000; loop: dec ecx; jnz loop; hlt  (16-bit code with 32-bit operands) */
	static const unsigned char code[] = { 0x66, 0xb9, 0x40, 0x42, 0x0f, 0x00, 0x66, 0x49, 0x75, 0xfc, 0xf4 };
	int kvm = check("/dev/kvm", open("/dev/kvm", O_RDWR | O_CLOEXEC));
	int version = check("KVM_GET_API_VERSION", ioctl(kvm, KVM_GET_API_VERSION, 0));
	int vm = check("KVM_CREATE_VM", ioctl(kvm, KVM_CREATE_VM, 0));
	unsigned char *memory = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (memory == MAP_FAILED)
		check("mmap", -1);
	memcpy(memory, code, sizeof(code));
	struct kvm_userspace_memory_region region = {
		.guest_phys_addr = 0x1000, .memory_size = 4096, .userspace_addr = (unsigned long)memory,
	};
	check("KVM_SET_USER_MEMORY_REGION", ioctl(vm, KVM_SET_USER_MEMORY_REGION, &region));
	int vcpu = check("KVM_CREATE_VCPU", ioctl(vm, KVM_CREATE_VCPU, 0));
	int size = check("KVM_GET_VCPU_MMAP_SIZE", ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
	struct kvm_run *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, vcpu, 0);

	if (run == MAP_FAILED)
		check("mmap of the vCPU", -1);
	struct kvm_sregs sregs;
	check("KVM_GET_SREGS", ioctl(vcpu, KVM_GET_SREGS, &sregs));
	sregs.cs.base = 0;
	sregs.cs.selector = 0;
	check("KVM_SET_SREGS", ioctl(vcpu, KVM_SET_SREGS, &sregs));
	struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
	check("KVM_SET_REGS", ioctl(vcpu, KVM_SET_REGS, &regs));

	struct timespec before, after;
	clock_gettime(CLOCK_MONOTONIC, &before);
	check("KVM_RUN", ioctl(vcpu, KVM_RUN, 0));
	clock_gettime(CLOCK_MONOTONIC, &after);
	check("KVM_GET_REGS", ioctl(vcpu, KVM_GET_REGS, &regs));
	if (run->exit_reason != KVM_EXIT_HLT || (regs.rcx & 0xffffffff) != 0) {
		fprintf(stderr, "exit reason %u with ecx %llu, expected a halt at 0\n", run->exit_reason, regs.rcx);
		return 1;
	}
	double seconds = (after.tv_sec - before.tv_sec) + (after.tv_nsec - before.tv_nsec) / 1e9;
	printf("KVM API %d: a guest of 2 million instructions ran in %.4f s: %.0f MIPS\n", version, seconds, 2 / seconds);
	return 0;
}
