/* Coming into a VMM that already runs a virtual machine: the agent was loaded into it by a debugger.
 *
 * What its ioctls would have told is looked for among its descriptors. Then the VMM's objects are made to call the agent's ioctl, and
 * the agent waits until no vCPU can be in a KVM_RUN that was entered without it: an exit that the VMM did not ask for would end it.
 */
#define _GNU_SOURCE
#if defined(__x86_64__)
#include <dirent.h>
#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#include "kvm.h"
#include "qemu_plugin.h"

enum { IA32_CORE_THREAD_COUNT = 0x35 };
enum { PATIENCE_MS = 10000 };

struct found {
    int vm;
    int device; /* /dev/kvm */
    unsigned vms;
    unsigned vcpus;
    struct {
        int fd;
        unsigned id;
    } vcpu[KVM_MOST_VCPUS];
};

/* ---- the VMM's descriptors ---- */

static void look_at(struct found *found, int fd, const char *target)
{
    unsigned id;
    if (strcmp(target, "anon_inode:kvm-vm") == 0) {
        found->vm = fd;
        found->vms++;
    } else if (strcmp(target, "/dev/kvm") == 0) {
        found->device = fd;
    } else if (sscanf(target, "anon_inode:kvm-vcpu:%u", &id) == 1 && found->vcpus < KVM_MOST_VCPUS) {
        found->vcpu[found->vcpus].fd = fd;
        found->vcpu[found->vcpus++].id = id;
    }
}

static void look_around(struct found *found)
{
    *found = (struct found){.vm = -1, .device = -1};
    DIR *folder = opendir("/proc/self/fd");
    struct dirent *entry;
    while (folder && (entry = readdir(folder)) != NULL) {
        char path[64], target[64];
        snprintf(path, sizeof path, "/proc/self/fd/%.20s", entry->d_name);
        ssize_t length = readlink(path, target, sizeof target - 1);
        if (length <= 0)
            continue;
        target[length] = '\0';
        look_at(found, atoi(entry->d_name), target);
    }
    if (folder)
        closedir(folder);
}

/* A VMM may have closed it. */
static int run_bytes(int device)
{
    int ours = device < 0 ? open("/dev/kvm", O_RDWR | O_CLOEXEC) : -1;
    int bytes = kvm_plain(ours < 0 ? device : ours, KVM_GET_VCPU_MMAP_SIZE, NULL);
    if (ours >= 0)
        close(ours);
    return bytes;
}

static bool take_in(const struct found *found)
{
    int bytes = run_bytes(found->device);
    if (bytes <= 0)
        return false;
    vm.fd = found->vm;
    vm.run_bytes = (uint32_t)bytes;
    /* In the order of their numbers, each once. */
    for (unsigned id = 0, taken = 0; taken < found->vcpus; id++) {
        if (id > 1 << 16)
            return false;
        for (unsigned i = 0; i < found->vcpus; i++) {
            if (found->vcpu[i].id != id)
                continue;
            void *run = mmap(NULL, vm.run_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, found->vcpu[i].fd, 0);
            if (run == MAP_FAILED || kvm_add_cpu(found->vcpu[i].fd, run) == NULL)
                return false;
            taken++;
        }
    }
    return true;
}

/* QEMU since 7.2 keeps this MSR to itself (target/i386/kvm/kvm.c); no ioctl tells what a VMM has set. */
static void assume_filter(void)
{
    uint8_t nothing = 0;
    const struct kvm_msr_filter filter = {
        .ranges = {{.flags = KVM_MSR_FILTER_READ, .nmsrs = 1, .base = IA32_CORE_THREAD_COUNT, .bitmap = &nothing}}};
    char program[256];
    ssize_t length = readlink("/proc/self/exe", program, sizeof program - 1);
    program[length > 0 ? length : 0] = '\0';
    if (vm_stop || strstr(program, "qemu"))
        msrs_assume(&filter, KVM_MSR_EXIT_REASON_FILTER);
}

/* ---- having the VMM call our ioctl ---- */

struct tables {
    const char *strings;
    const ElfW(Sym) *symbols;
    const ElfW(Rela) *relocations[2];
    size_t bytes[2];
};

static struct tables tables_of(const struct dl_phdr_info *object)
{
    struct tables tables = {0};
    const ElfW(Dyn) *entry = NULL;
    for (int i = 0; i < object->dlpi_phnum; i++)
        if (object->dlpi_phdr[i].p_type == PT_DYNAMIC)
            entry = (const ElfW(Dyn) *)(object->dlpi_addr + object->dlpi_phdr[i].p_vaddr);
    for (; entry && entry->d_tag != DT_NULL; entry++) {
        /* The dynamic linker has made addresses of these, except in the vDSO. */
        const void *address = (const void *)entry->d_un.d_ptr;
        switch (entry->d_tag) {
        case DT_STRTAB:
            tables.strings = address;
            break;
        case DT_SYMTAB:
            tables.symbols = address;
            break;
        case DT_RELA:
            tables.relocations[0] = address;
            break;
        case DT_RELASZ:
            tables.bytes[0] = entry->d_un.d_val;
            break;
        case DT_JMPREL:
            tables.relocations[1] = address;
            break;
        case DT_PLTRELSZ:
            tables.bytes[1] = entry->d_un.d_val;
            break;
        }
    }
    return tables;
}

/* The slot may be read-only, and stays what it was. */
static void redirect(uintptr_t *slot, bool was_read_only)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    void *start = (void *)((uintptr_t)slot & ~(page - 1));
    if (mprotect(start, page, PROT_READ | PROT_WRITE) != 0)
        return;
    __atomic_store_n(slot, (uintptr_t)kvm_ioctl, __ATOMIC_SEQ_CST);
    if (was_read_only)
        mprotect(start, page, PROT_READ);
}

static bool is_relro(const struct dl_phdr_info *object, uintptr_t address)
{
    for (int i = 0; i < object->dlpi_phnum; i++) {
        const ElfW(Phdr) *segment = &object->dlpi_phdr[i];
        if (segment->p_type == PT_GNU_RELRO && address - object->dlpi_addr - segment->p_vaddr < segment->p_memsz)
            return true;
    }
    return false;
}

static int redirect_object(struct dl_phdr_info *object, size_t size, void *unused)
{
    (void)size, (void)unused;
    if (object->dlpi_name && strstr(object->dlpi_name, "vdso"))
        return 0;
    const struct tables tables = tables_of(object);
    for (unsigned kind = 0; kind < 2 && tables.strings && tables.symbols; kind++)
        for (size_t i = 0; tables.relocations[kind] && i < tables.bytes[kind] / sizeof(ElfW(Rela)); i++) {
            const ElfW(Rela) *relocation = &tables.relocations[kind][i];
            const unsigned type = ELF64_R_TYPE(relocation->r_info);
            if (type != R_X86_64_JUMP_SLOT && type != R_X86_64_GLOB_DAT)
                continue;
            if (strcmp(tables.strings + tables.symbols[ELF64_R_SYM(relocation->r_info)].st_name, "ioctl") != 0)
                continue;
            const uintptr_t slot = object->dlpi_addr + relocation->r_offset;
            redirect((uintptr_t *)slot, is_relro(object, slot));
        }
    return 0;
}

/* ---- waiting until no vCPU is in the guest without us ---- */

/* A thread of the kernel's that looks like one of the VMM's (KVM has one for its large pages): its system call is the one in which it
 * was made, which may be KVM_RUN, and never ends. */
static bool is_kernels(const char *thread)
{
    enum { USER_WORKER = 0x4000 }; /* PF_USER_WORKER, include/linux/sched.h */
    char path[96], text[512] = "";
    unsigned flags = 0;
    snprintf(path, sizeof path, "/proc/self/task/%.20s/stat", thread);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return false;
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    const char *behind_name = length > 0 ? strrchr(text, ')') : NULL;
    return behind_name && sscanf(behind_name, ") %*c %*d %*d %*d %*d %*d %u", &flags) == 1 && (flags & USER_WORKER);
}

static bool may_be_inside(const char *thread, int fd)
{
    char path[96], call[64] = "";
    long number, descriptor;
    unsigned long request;
    snprintf(path, sizeof path, "/proc/self/task/%.20s/syscall", thread);
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return false; /* it has ended */
    ssize_t length = read(file, call, sizeof call - 1);
    close(file);
    if (length <= 0 || strncmp(call, "running", 7) == 0)
        return !is_kernels(thread);
    return sscanf(call, "%ld %lx %lx", &number, (unsigned long *)&descriptor, &request) == 3 && number == SYS_ioctl &&
           (descriptor & INT32_MAX) == fd && (uint32_t)request == KVM_RUN && !is_kernels(thread);
}

/* A vCPU whose thread waits for something else comes through our ioctl when it goes on. */
static bool is_outside(const struct cpu *cpu)
{
    if (__atomic_load_n(&cpu->passed, __ATOMIC_ACQUIRE))
        return true;
    char self[24];
    bool outside = true;
    snprintf(self, sizeof self, "%ld", syscall(SYS_gettid));
    DIR *folder = opendir("/proc/self/task");
    struct dirent *entry;
    while (folder && outside && (entry = readdir(folder)) != NULL)
        if (entry->d_name[0] != '.' && strcmp(entry->d_name, self) != 0)
            outside = !may_be_inside(entry->d_name, cpu->fd);
    if (folder)
        closedir(folder);
    return outside && folder;
}

static bool wait_until_outside(void)
{
    const struct timespec moment = {.tv_nsec = 1000000};
    int left = PATIENCE_MS;
    for (unsigned i = 0; i < vm.count; i++)
        while (!is_outside(vm.cpus[i])) {
            if (left-- == 0)
                return false;
            nanosleep(&moment, NULL);
        }
    return true;
}

/* ---- the beginning ---- */

/* Abstract, as vmexit makes it for the machines that it starts. */
static int make_socket(void)
{
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    uint64_t number;
    if (getrandom(&number, sizeof number, 0) != sizeof number)
        return -1;
    int length = snprintf(address.sun_path + 1, sizeof address.sun_path - 1, "vmexit-%016llx", (unsigned long long)number);
    int listening = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
    socklen_t size = (socklen_t)(offsetof(struct sockaddr_un, sun_path) + 1 + (size_t)length);
    if (listening >= 0 && bind(listening, (struct sockaddr *)&address, size) == 0 && listen(listening, 4) == 0)
        return listening;
    close(listening);
    return -1;
}

static void *come_in(void *unused)
{
    static struct found found;
    (void)unused;
    look_around(&found);
    if (found.vms != 1 || !take_in(&found))
        return NULL;
    assume_filter();
    __atomic_store_n(&vm.active, true, __ATOMIC_SEQ_CST);
    dl_iterate_phdr(redirect_object, NULL);
    bool outside = wait_until_outside();
    if (outside)
        slots_find(found.device);
    int listening = outside ? make_socket() : -1;
    if (listening >= 0 && !kvm_serve(listening))
        close(listening);
    return NULL;
}

/* Loaded by the VMM itself, as a plugin, or before it has begun, the agent finds no virtual machine yet. */
__attribute__((constructor)) static void look_for_vm(void)
{
    static struct found found;
    sigset_t all, before;
    pthread_t thread;
    if (getenv("VMEXIT_AGENT") != NULL)
        return;
    look_around(&found);
    if (found.vm < 0)
        return;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    if (pthread_create(&thread, NULL, come_in, NULL) == 0)
        pthread_detach(thread);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}
#endif
