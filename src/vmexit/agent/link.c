/* The control socket: one thread that serves one debugger at a time and lets go of everything when that debugger is gone. */
#define _GNU_SOURCE
#include <errno.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include "script_trap.h"

/* A script's own and its buffer's. */
enum { MOST_FILES = 2 };
enum { MOST_PAYLOAD = VMEXIT_MAX_EVENTS * sizeof(struct vmexit_event) };

struct datagram {
    struct vmexit_message message;
    _Alignas(8) uint8_t payload[MOST_PAYLOAD];
};

static struct {
    int listening;
    int client; /* -1: no debugger; changed by the link's thread alone, under the lock */
    int wake; /* an eventfd: the machine has been halted for a break */
    pthread_mutex_t lock;
    bool greeted;
    bool held; /* the debugger keeps the machine halted */
    int files[MOST_FILES]; /* that came with the message; -1: none did */
    struct datagram in;
} server = {.client = -1, .files = {-1, -1}, .lock = PTHREAD_MUTEX_INITIALIZER};

/* ---- sending ---- */

static void send_with(int socket, const struct vmexit_message *message, const void *payload, const int *fds, size_t fd_count, int flags)
{
    struct iovec parts[2] = {
        {.iov_base = (void *)message, .iov_len = sizeof *message},
        {.iov_base = (void *)payload, .iov_len = message->length},
    };
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(2 * sizeof(int))] = {0};
    struct msghdr header = {.msg_iov = parts, .msg_iovlen = 2};
    if (fd_count) {
        header.msg_control = control;
        header.msg_controllen = CMSG_SPACE(fd_count * sizeof(int));
        struct cmsghdr *rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(fd_count * sizeof(int));
        memcpy(CMSG_DATA(rights), fds, fd_count * sizeof(int));
    }
    /* A debugger that has gone or does not read is noticed by the reading side. */
    while (sendmsg(socket, &header, MSG_NOSIGNAL | flags) < 0 && errno == EINTR)
        ;
}

static void answer(int status, const void *payload, size_t length, const int *fds, size_t fd_count)
{
    struct vmexit_message message = server.in.message;
    message.magic = VMEXIT_WIRE_MAGIC;
    message.status = (uint16_t)status;
    message.length = (uint32_t)length;
    send_with(server.client, &message, payload, fds, fd_count, 0);
}

static void announce(unsigned vcpu, int flags)
{
    int eventfd = core_vcpu_eventfd(vcpu);
    struct vmexit_message message = {.magic = VMEXIT_WIRE_MAGIC, .type = VMEXIT_VCPU, .vcpu = vcpu};
    if (eventfd >= 0)
        send_with(server.client, &message, NULL, &eventfd, 1, flags);
}

void link_announce_vcpu(unsigned vcpu)
{
    pthread_mutex_lock(&server.lock);
    if (server.client >= 0 && server.greeted)
        announce(vcpu, MSG_DONTWAIT);
    pthread_mutex_unlock(&server.lock);
}

static void announce_machine(bool running, int flags)
{
    struct vmexit_message message = {.magic = VMEXIT_WIRE_MAGIC, .type = VMEXIT_MACHINE, .argument = running};
    send_with(server.client, &message, NULL, NULL, 0, flags);
}

void link_announce_machine(bool running)
{
    pthread_mutex_lock(&server.lock);
    if (server.client >= 0 && server.greeted)
        announce_machine(running, MSG_DONTWAIT);
    pthread_mutex_unlock(&server.lock);
}

/* ---- what the debugger asks for ---- */

static void greet(void)
{
    const struct door *door = core_door();
    struct vmexit_hello hello = {
        .version = VMEXIT_WIRE_VERSION,
        .capabilities = door->capabilities,
        .vcpus = core_vcpus(),
        .plugin_api = door->plugin_api,
        .sequence = core_attach(),
    };
    strncpy(hello.door, door->name, sizeof hello.door - 1);
    int fds[2] = {core_shared_fd(), core_debugger_eventfd()};
    answer(VMEXIT_OK, &hello, sizeof hello, fds, 2);
    pthread_mutex_lock(&server.lock);
    server.greeted = true;
    pthread_mutex_unlock(&server.lock);
    /* More than some 270 do not fit into the socket; then the rest waits until the debugger reads. */
    for (unsigned vcpu = 0; vcpu < core_vcpus(); vcpu++)
        announce(vcpu, 0);
    /* The last word of the greeting, and in order with what comes later. */
    pthread_mutex_lock(&server.lock);
    if (door->is_running)
        announce_machine(door->is_running(), 0);
    pthread_mutex_unlock(&server.lock);
}

static void hello_asked(void)
{
    uint32_t version;
    if (server.greeted || server.in.message.length != sizeof version) {
        answer(VMEXIT_REFUSED, NULL, 0, NULL, 0);
        return;
    }
    memcpy(&version, server.in.payload, sizeof version);
    if (version == VMEXIT_WIRE_VERSION)
        greet();
    else
        answer(VMEXIT_WRONG_VERSION, NULL, 0, NULL, 0);
}

static int set_events(const struct vmexit_message *message)
{
    size_t count = message->argument;
    if (count > VMEXIT_MAX_EVENTS || message->length != count * sizeof(struct vmexit_event))
        return VMEXIT_REFUSED;
    return core_set_events((const struct vmexit_event *)server.in.payload, count, message->address);
}

static int add_script(const struct vmexit_message *message)
{
    struct vmexit_script_file file;
    if (message->length != sizeof file || server.files[0] < 0)
        return VMEXIT_REFUSED;
    memcpy(&file, server.in.payload, sizeof file);
    return scripts_add(&file, server.files[0], server.files[1]);
}

static void read_registers(const struct vmexit_message *message)
{
    uint64_t registers[VMEXIT_REGISTERS] = {0};
    int status = message->length == 0 ? core_door()->get_registers(message->vcpu, registers) : VMEXIT_REFUSED;
    answer(status, registers, status == VMEXIT_OK ? sizeof registers : 0, NULL, 0);
}

static void read_msr(const struct vmexit_message *message)
{
    const struct door *door = core_door();
    uint64_t value = 0;
    int status = VMEXIT_REFUSED;
    if (message->length == 0)
        status = door->access_msr ? door->access_msr(message->vcpu, false, message->argument, &value) : VMEXIT_UNAVAILABLE;
    answer(status, &value, status == VMEXIT_OK ? sizeof value : 0, NULL, 0);
}

static int write_msr(const struct vmexit_message *message)
{
    uint64_t value = message->address;
    if (message->length != 0)
        return VMEXIT_REFUSED;
    return core_door()->access_msr ? core_door()->access_msr(message->vcpu, true, message->argument, &value) : VMEXIT_UNAVAILABLE;
}

static void read_one_register(const struct vmexit_message *message)
{
    uint64_t value = 0;
    int status = VMEXIT_REFUSED;
    if (message->length == 0 && message->argument < VMEXIT_SCRIPT_REGISTERS)
        status = core_door()->get_register(message->vcpu, message->argument, &value);
    answer(status, &value, status == VMEXIT_OK ? sizeof value : 0, NULL, 0);
}

static void translate(const struct vmexit_message *message)
{
    uint64_t translated = 0;
    int status = VMEXIT_REFUSED;
    if (message->length == 0 && message->argument <= 1)
        status = core_door()->translate(message->vcpu, message->argument, message->address, &translated);
    answer(status, &translated, status == VMEXIT_OK ? sizeof translated : 0, NULL, 0);
}

static void read_memory(const struct vmexit_message *message)
{
    uint8_t bytes[VMEXIT_MAX_TRANSFER];
    bool physical = message->type == VMEXIT_READ_PHYSICAL;
    uint32_t length = message->argument;
    int status = VMEXIT_REFUSED;
    if (length > 0 && length <= sizeof bytes && message->length == 0)
        status = core_door()->access_memory(message->vcpu, physical, false, message->address, bytes, length);
    answer(status, bytes, status == VMEXIT_OK ? length : 0, NULL, 0);
}

static int write_memory(const struct vmexit_message *message)
{
    bool physical = message->type == VMEXIT_WRITE_PHYSICAL;
    if (message->length == 0 || message->length > VMEXIT_MAX_TRANSFER)
        return VMEXIT_REFUSED;
    return core_door()->access_memory(message->vcpu, physical, true, message->address, server.in.payload, message->length);
}

static int change(const struct vmexit_message *message)
{
    bool bare = message->length == 0;
    bool flag = message->argument <= 1 && bare;
    switch (message->type) {
    case VMEXIT_EVENTS:
        return set_events(message);
    case VMEXIT_OVERFLOW:
        if (flag)
            core_set_overflow_drop(message->argument);
        return flag ? VMEXIT_OK : VMEXIT_REFUSED;
    case VMEXIT_HOLD:
        if (flag)
            __atomic_store_n(&server.held, message->argument, __ATOMIC_SEQ_CST);
        return flag ? VMEXIT_OK : VMEXIT_REFUSED;
    case VMEXIT_HALT:
        if (flag && core_door()->set_halted == NULL)
            return VMEXIT_UNAVAILABLE;
        return flag ? core_door()->set_halted(message->argument) : VMEXIT_REFUSED;
    case VMEXIT_DECIDE:
        return flag ? core_door()->decide(message->vcpu, message->argument) : VMEXIT_REFUSED;
    case VMEXIT_SET_REGISTER:
        if (!bare || message->argument >= VMEXIT_SCRIPT_REGISTERS)
            return VMEXIT_REFUSED;
        return core_door()->set_register(message->vcpu, message->argument, message->address);
    case VMEXIT_WRITE_MSR:
        return write_msr(message);
    case VMEXIT_ADD_SCRIPT:
        return add_script(message);
    case VMEXIT_SCRIPT_LIMITS:
        return bare ? scripts_set_limits(message->address, message->argument) : VMEXIT_REFUSED;
    case VMEXIT_SET_RECIPE:
        return tasks_set_recipe(server.in.payload, message->length);
    case VMEXIT_SET_CODE:
        return callers_set_code(server.in.payload, message->length);
    case VMEXIT_WRITE_VIRTUAL:
    case VMEXIT_WRITE_PHYSICAL:
        return write_memory(message);
    default:
        return VMEXIT_REFUSED;
    }
}

static void serve(size_t received)
{
    struct vmexit_message *message = &server.in.message;
    if (received < sizeof *message || message->magic != VMEXIT_WIRE_MAGIC || received != sizeof *message + message->length) {
        *message = (struct vmexit_message){.type = received < sizeof *message ? 0 : message->type};
        answer(VMEXIT_REFUSED, NULL, 0, NULL, 0);
    } else if (message->type == VMEXIT_HELLO) {
        hello_asked();
    } else if (!server.greeted) {
        answer(VMEXIT_REFUSED, NULL, 0, NULL, 0);
    } else if (message->type == VMEXIT_GET_REGISTERS) {
        read_registers(message);
    } else if (message->type == VMEXIT_READ_MSR) {
        read_msr(message);
    } else if (message->type == VMEXIT_GET_REGISTER) {
        read_one_register(message);
    } else if (message->type == VMEXIT_TRANSLATE) {
        translate(message);
    } else if (message->type == VMEXIT_READ_VIRTUAL || message->type == VMEXIT_READ_PHYSICAL) {
        read_memory(message);
    } else {
        answer(change(message), NULL, 0, NULL, 0);
    }
}

/* ---- coming and going ---- */

static bool is_ours(int socket)
{
    struct ucred peer;
    socklen_t length = sizeof peer;
    if (getsockopt(socket, SOL_SOCKET, SO_PEERCRED, &peer, &length) != 0)
        return false;
    return peer.uid == geteuid() || peer.uid == 0;
}

static void welcome(void)
{
    int socket = accept4(server.listening, NULL, NULL, SOCK_CLOEXEC);
    if (socket < 0)
        return;
    if (!is_ours(socket)) {
        close(socket);
    } else if (server.client >= 0) {
        struct vmexit_message busy = {.magic = VMEXIT_WIRE_MAGIC, .type = VMEXIT_HELLO, .status = VMEXIT_BUSY};
        send_with(socket, &busy, NULL, NULL, 0, MSG_DONTWAIT);
        close(socket);
    } else {
        pthread_mutex_lock(&server.lock);
        server.client = socket;
        server.greeted = false;
        pthread_mutex_unlock(&server.lock);
    }
}

static void part(void)
{
    pthread_mutex_lock(&server.lock);
    close(server.client);
    server.client = -1;
    pthread_mutex_unlock(&server.lock);
    if (server.greeted)
        core_detach();
}

/* The files that came with a message. */
static void take_files(struct msghdr *header)
{
    struct cmsghdr *rights = CMSG_FIRSTHDR(header);
    if (rights && rights->cmsg_level == SOL_SOCKET && rights->cmsg_type == SCM_RIGHTS && rights->cmsg_len <= CMSG_LEN(sizeof server.files))
        memcpy(server.files, CMSG_DATA(rights), rights->cmsg_len - CMSG_LEN(0));
}

static void drop_files(void)
{
    for (int i = 0; i < MOST_FILES; i++) {
        if (server.files[i] >= 0)
            close(server.files[i]);
        server.files[i] = -1;
    }
}

static ssize_t receive(void)
{
    struct iovec part = {.iov_base = &server.in, .iov_len = sizeof server.in};
    /* No room for more: the kernel closes those. */
    _Alignas(struct cmsghdr) char control[CMSG_LEN(sizeof server.files)];
    struct msghdr header = {.msg_iov = &part, .msg_iovlen = 1, .msg_control = control, .msg_controllen = sizeof control};
    ssize_t received = recvmsg(server.client, &header, MSG_TRUNC | MSG_CMSG_CLOEXEC);
    if (received >= 0)
        take_files(&header);
    return received;
}

static void listen_to_debugger(void)
{
    ssize_t received = receive();
    if (received < 0 && (errno == EINTR || errno == EAGAIN))
        return;
    if (received <= 0)
        part();
    else
        serve((size_t)received <= sizeof server.in ? (size_t)received : 0);
    drop_files();
}

/* A machine that was halted for a debugger which has died since goes on. */
static void resume_orphan(void)
{
    if (server.client < 0 && __atomic_exchange_n(&server.held, false, __ATOMIC_SEQ_CST))
        core_door()->resume();
}

void link_machine_held(void)
{
    uint64_t one = 1;
    __atomic_store_n(&server.held, true, __ATOMIC_SEQ_CST);
    (void)!write(server.wake, &one, sizeof one);
}

static void *run(void *unused)
{
    (void)unused;
    core_door()->enter_thread();
    for (;;) {
        struct pollfd fds[] = {
            {.fd = server.listening, .events = POLLIN},
            {.fd = server.wake, .events = POLLIN},
            {.fd = server.client, .events = POLLIN}, /* a negative descriptor is passed over */
        };
        if (poll(fds, 3, -1) < 0)
            continue;
        uint64_t count;
        if (fds[1].revents)
            (void)!read(server.wake, &count, sizeof count);
        if (fds[2].revents)
            listen_to_debugger();
        /* One that is gone must not keep the next one out by what it still had to say. */
        while (server.client >= 0 && fds[2].revents & POLLHUP)
            listen_to_debugger();
        /* Before the next one comes, which would find a machine halted that nobody has halted for it. */
        resume_orphan();
        if (fds[0].revents)
            welcome();
    }
    return NULL;
}

bool link_is_listening(int fd)
{
    int is_listening = 0;
    socklen_t length = sizeof is_listening;
    return getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &is_listening, &length) == 0 && is_listening;
}

bool link_start(int listening_fd)
{
    pthread_t thread;
    sigset_t all, before;
    server.listening = listening_fd;
    server.wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (server.wake < 0)
        return false;
    /* The VMM's signals are for the VMM's threads. */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = pthread_create(&thread, NULL, run, NULL);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return error == 0;
}
