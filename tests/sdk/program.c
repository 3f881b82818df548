/* A program as somebody has written it for HyperDbg, with DeviceIoControl replaced by a function of the same arguments.
 *
 *     program SOCKET MSR [condition]
 *
 * Makes an event at WRMSR of MSR (hexadecimal) that changes the value written to 1234, or with "condition" only where RAX's low byte is
 * not 0; prints what comes back of each request. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "hyperdbg.h"

static int receive(int device, void *bytes, size_t length)
{
    for (size_t done = 0; done < length;) {
        ssize_t now = read(device, (char *)bytes + done, length - done);
        if (now <= 0)
            return 0;
        done += (size_t)now;
    }
    return 1;
}

static int DeviceIoControl(int device, UINT32 code, const void *in, UINT32 in_size, void *out, UINT32 out_size, UINT32 *returned)
{
    const UINT32 request[3] = {code, in_size, out_size};
    UINT32 answer[2];
    if (write(device, request, sizeof request) != sizeof request || write(device, in, in_size) != (ssize_t)in_size)
        return 0;
    if (!receive(device, answer, sizeof answer) || answer[1] > out_size || !receive(device, out, answer[1]))
        return 0;
    *returned = answer[1];
    return answer[0] == 0;
}

static void tell(const char *what, int done, const DEBUGGER_EVENT_AND_ACTION_RESULT *result)
{
    printf("%s: done %d, successful %u, error %x\n", what, done, result->IsSuccessful, result->Error);
}

int main(int argc, char **argv)
{
    static const unsigned char condition[] = {0x48, 0x8b, 0x01, 0x0f, 0xb6, 0xc0, 0xc3}; /* mov rax, [rcx]; movzx eax, al; ret */
    static const unsigned char code[] = {0x48, 0xc7, 0x02, 0x34, 0x12, 0x00, 0x00,       /* mov qword ptr [rdx], 1234h */
                                         0x48, 0xc7, 0x42, 0x10, 0x00, 0x00, 0x00, 0x00, /* mov qword ptr [rdx + 10h], 0 */
                                         0xc3};
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    const int conditional = argc > 3;
    if (argc < 3)
        return 2;
    strncpy(address.sun_path, argv[1], sizeof address.sun_path - 1);
    int device = socket(AF_UNIX, SOCK_STREAM, 0);
    if (connect(device, (struct sockaddr *)&address, sizeof address) != 0)
        return 3;

    struct {
        DEBUGGER_GENERAL_EVENT_DETAIL event;
        unsigned char condition[sizeof condition];
    } event = {.event = {
                   .CoreId = DEBUGGER_EVENT_APPLY_TO_ALL_CORES,
                   .ProcessId = DEBUGGER_EVENT_APPLY_TO_ALL_PROCESSES,
                   .IsEnabled = 1,
                   .EventStage = VMM_CALLBACK_CALLING_STAGE_PRE_EVENT_EMULATION,
                   .Tag = 0x1000000,
                   .EventType = WRMSR_INSTRUCTION_EXECUTION,
                   .Options.OptionalParam1 = strtoul(argv[2], NULL, 16),
                   .ConditionBufferSize = conditional ? sizeof condition : 0,
               }};
    char *sent = malloc(sizeof event.event + sizeof condition);
    memcpy(sent, &event.event, sizeof event.event);
    memcpy(sent + sizeof event.event, condition, sizeof condition);
    DEBUGGER_EVENT_AND_ACTION_RESULT result = {0};
    UINT32 returned = 0;
    UINT32 length = (UINT32)sizeof event.event + event.event.ConditionBufferSize;
    int done = DeviceIoControl(device, IOCTL_DEBUGGER_REGISTER_EVENT, sent, length, &result, sizeof result, &returned);
    tell("event", done, &result);

    DEBUGGER_MODIFY_EVENTS query = {.Tag = event.event.Tag, .TypeOfAction = DEBUGGER_MODIFY_EVENTS_QUERY_STATE};
    done = DeviceIoControl(device, IOCTL_DEBUGGER_MODIFY_EVENTS, &query, sizeof query, &query, sizeof query, &returned);
    printf("enabled: done %d, status %llx, %u\n", done, (unsigned long long)query.KernelStatus, query.IsEnabled);

    DEBUGGER_GENERAL_ACTION action = {.EventTag = event.event.Tag, .ActionType = RUN_CUSTOM_CODE, .CustomCodeBufferSize = sizeof code};
    char *buffer = malloc(sizeof action + sizeof code);
    memcpy(buffer, &action, sizeof action);
    memcpy(buffer + sizeof action, code, sizeof code);
    done = DeviceIoControl(device, IOCTL_DEBUGGER_ADD_ACTION_TO_EVENT, buffer, sizeof action + sizeof code, &result, sizeof result, &returned);
    tell("action", done, &result);

    done = DeviceIoControl(device, IOCTL_DEBUGGER_MODIFY_EVENTS, &query, sizeof query, &query, sizeof query, &returned);
    printf("enabled: done %d, status %llx, %u\n", done, (unsigned long long)query.KernelStatus, query.IsEnabled);

    action.EventTag = 0x77;
    done = DeviceIoControl(device, IOCTL_DEBUGGER_ADD_ACTION_TO_EVENT, &action, sizeof action, &result, sizeof result, &returned);
    tell("another", done, &result);
    done = DeviceIoControl(device, IOCTL_DEBUGGER_REGISTER_EVENT, &action, sizeof action, &result, sizeof result, &returned);
    printf("short: done %d\n", done);
    free(sent);
    free(buffer);
    close(device);
    return 0;
}
