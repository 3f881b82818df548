/* What compiled scripts and what runs them share: the context that a script is given, the functions it may call, its errors.
 *
 * The compiler (src/vmexit/script) and the runtime (script.c) both read this file, the former with cffi: it holds plain structs and
 * "#define NAME number" only. A compiled script is position-independent code with one entry,
 *
 *     uint32_t entry(struct vmexit_script_context *context);     0, or the error that ended the run
 *
 * It touches its own stack frame, the context, the registers, the globals and its frame of the arena by addresses that it is given here
 * and offsets that were checked when it was compiled or are checked before the access. Everything else goes through `functions`.
 *
 * Script addresses. What a script knows as an address is the guest's, unless its top byte is VMEXIT_ARENA_TAG: then bits 48-55 name a
 * segment of the arena and the rest is an offset into it. No such address is canonical, with 48 or with 57 bits, so none is the guest's.
 */
#ifndef VMEXIT_SCRIPT_H
#define VMEXIT_SCRIPT_H

#include <stdint.h>

#define VMEXIT_SCRIPT_VERSION 1

#define VMEXIT_ARENA_TAG 0x5c
#define VMEXIT_ARENA_CONSTANTS 0 /* strings; read only, the script's own */
#define VMEXIT_ARENA_GLOBALS 1 /* 8 bytes each; shared by all scripts and vCPUs */
#define VMEXIT_ARENA_STACK 2 /* arrays, structs and variables whose address is taken; the vCPU's own */
#define VMEXIT_ARENA_BUFFER 3 /* $buffer; the event's own */
#define VMEXIT_ARENA_TEXT 4 /* $date, $time, $pname; the run's own, read only */
#define VMEXIT_ARENA_SEGMENTS 5

#define VMEXIT_MAX_GLOBALS 4096
#define VMEXIT_MAX_FRAME 65536 /* bytes of the arena that one function's variables can take */
#define VMEXIT_MAX_NATIVE_FRAME 16384 /* bytes of the native stack that one compiled function can take */
#define VMEXIT_MAX_SLOTS 32 /* of one print */
#define VMEXIT_MAX_PRINT 8192 /* bytes that one print leaves */
#define VMEXIT_MAX_STRING 4095 /* characters of one string in a print */
#define VMEXIT_MAX_LOCKS 8 /* spinlocks that one run can hold */
#define VMEXIT_MAX_SLEEP 1000000 /* microseconds */

/* The budgets of a run, unless they are set, and the most and least stack that can be set. */
#define VMEXIT_DEFAULT_STEPS 1000000
#define VMEXIT_DEFAULT_STACK 262144
#define VMEXIT_MAX_STACK 1048576
#define VMEXIT_MIN_STACK 32768
#define VMEXIT_ARENA_STACK_BYTES 65536
#define VMEXIT_LOCK_WAIT_NS 1000000000 /* before a lock counts as never to be had */

#define VMEXIT_FIRST_TAG 0x1000000 /* $event_tag of event 0 */

/* Registers beyond those of wire.h (VMEXIT_RAX ...), for get_register and set_register. */
#define VMEXIT_SCRIPT_GDTR 33
#define VMEXIT_SCRIPT_IDTR 34
#define VMEXIT_SCRIPT_LDTR 35
#define VMEXIT_SCRIPT_TR 36
#define VMEXIT_SCRIPT_DR0 37
#define VMEXIT_SCRIPT_DR1 38
#define VMEXIT_SCRIPT_DR2 39
#define VMEXIT_SCRIPT_DR3 40
#define VMEXIT_SCRIPT_DR6 41
#define VMEXIT_SCRIPT_DR7 42
#define VMEXIT_SCRIPT_REGISTERS 43

/* vmexit_script_context.values: pseudo-registers that only need to be read. */
#define VMEXIT_VALUE_CONTEXT 0
#define VMEXIT_VALUE_EVENT_STAGE 1 /* 0 pre, 1 post */
#define VMEXIT_VALUE_EVENT_ID 2
#define VMEXIT_VALUE_EVENT_TAG 3
#define VMEXIT_VALUE_CORE 4
#define VMEXIT_VALUE_RIP 5
#define VMEXIT_VALUE_FAULT 6
#define VMEXIT_VALUE_BUFFER 7 /* a script address, or 0 */
#define VMEXIT_VALUE_PID 8
#define VMEXIT_VALUE_TID 9
#define VMEXIT_VALUE_PNAME 10 /* a script address */
#define VMEXIT_VALUE_PROC 11
#define VMEXIT_VALUE_THREAD 12
#define VMEXIT_VALUE_PEB 13
#define VMEXIT_VALUE_TEB 14
#define VMEXIT_VALUES 15

/* What ends a run. `detail` of the context: the address or number to blame. */
#define VMEXIT_FAULT_NONE 0
#define VMEXIT_FAULT_DIVISION 1
#define VMEXIT_FAULT_OVERFLOW 2
#define VMEXIT_FAULT_SHIFT 3
#define VMEXIT_FAULT_INDEX 4
#define VMEXIT_FAULT_FLOAT 5
#define VMEXIT_FAULT_CONVERSION 6
#define VMEXIT_FAULT_DIFFERENCE 7
#define VMEXIT_FAULT_READ 8
#define VMEXIT_FAULT_WRITE 9
#define VMEXIT_FAULT_STEPS 10
#define VMEXIT_FAULT_STACK 11
#define VMEXIT_FAULT_MACHINE 12 /* there is none, or it cannot do that */
#define VMEXIT_FAULT_REGISTER 13
#define VMEXIT_FAULT_TEXT 14
#define VMEXIT_FAULT_LOCK 15
#define VMEXIT_FAULT_ATOMIC 16
#define VMEXIT_FAULT_LENGTH 17
#define VMEXIT_FAULT_OUTPUT 18
#define VMEXIT_FAULT_SLEEP 19
#define VMEXIT_FAULT_EVENT 20

/* vmexit_script_context.functions, by number. Each is called as uint64_t f(context, uint64_t...) and may set `error`. */
#define VMEXIT_CALL_GET_REGISTER 0 /* number */
#define VMEXIT_CALL_SET_REGISTER 1 /* number, value */
#define VMEXIT_CALL_LOAD 2 /* address, bytes */
#define VMEXIT_CALL_STORE 3 /* address, value, bytes */
#define VMEXIT_CALL_LOAD_PHYSICAL 4
#define VMEXIT_CALL_EDIT 5 /* address, value, bytes -> 1, or 0 where it cannot be written */
#define VMEXIT_CALL_EDIT_PHYSICAL 6
#define VMEXIT_CALL_CHECK 7 /* address -> 1 or 0 */
#define VMEXIT_CALL_TO_PHYSICAL 8
#define VMEXIT_CALL_TO_VIRTUAL 9
#define VMEXIT_CALL_COPY 10 /* destination, source, bytes */
#define VMEXIT_CALL_COPY_PHYSICAL 11
#define VMEXIT_CALL_COMPARE 12 /* address, address, bytes -> -1, 0, 1; 2 where unreadable */
#define VMEXIT_CALL_LENGTH 13 /* address of a string, bytes of a character -> characters; 0 where unreadable */
#define VMEXIT_CALL_COMPARE_TEXT 14 /* address, address, most characters, bytes of a character */
#define VMEXIT_CALL_PRINT 15 /* format, slots, address of the slots, masks of strings, of wide strings, of limited strings */
#define VMEXIT_CALL_ADD 16 /* address, value -> old */
#define VMEXIT_CALL_EXCHANGE 17
#define VMEXIT_CALL_COMPARE_EXCHANGE 18 /* address, value, comparand -> old */
#define VMEXIT_CALL_LOCK 19 /* address, pauses between two looks */
#define VMEXIT_CALL_UNLOCK 20
#define VMEXIT_CALL_EVENT_SC 21
#define VMEXIT_CALL_EVENT_ENABLE 22
#define VMEXIT_CALL_EVENT_DISABLE 23
#define VMEXIT_CALL_EVENT_CLEAR 24
#define VMEXIT_CALL_PAUSE 25
#define VMEXIT_CALL_FLUSH 26
#define VMEXIT_CALL_RDTSC 27
#define VMEXIT_CALL_RDTSCP 28
#define VMEXIT_CALL_SLEEP 29 /* microseconds */
#define VMEXIT_CALL_DATE 30 /* -> script address of the text */
#define VMEXIT_CALL_TIME 31
#define VMEXIT_CALL_INSTRUCTION 32 /* address, 64 or 32 -> bytes, or 0 */
#define VMEXIT_CALL_ENTER 33 /* bytes -> offset of a zeroed frame in the stack segment */
#define VMEXIT_CALL_ZERO 34 /* offset in the stack segment, bytes */
#define VMEXIT_CALLS 35

struct vmexit_segment {
    uint8_t *bytes;
    uint64_t size;
    uint64_t writable;
};

struct vmexit_script_host;

/* What a run is given and leaves behind. Offsets of it are compiled into scripts. */
struct vmexit_script_context {
    uint64_t *registers; /* the 16 general ones, in encoding order */
    uint64_t *globals; /* the segment's bytes */
    uint8_t *stack; /* the segment's bytes */
    void *const *functions;
    uint64_t stack_used; /* bytes */
    uint64_t native_floor; /* the native stack must stay above this address */
    uint64_t steps; /* iterations and calls that are left */
    uint64_t detail;
    uint32_t error;
    uint32_t place; /* number of the place in the source that `error` comes from */
    uint32_t changed; /* bit n: registers[n] was written */
    uint32_t lock_count;
    uint64_t values[VMEXIT_VALUES];
    struct vmexit_segment segments[VMEXIT_ARENA_SEGMENTS];
    uint64_t *locks[VMEXIT_MAX_LOCKS]; /* held by this run */
    const struct vmexit_script_host *host;
    void *machine; /* the host's own */
    int64_t local_time; /* seconds east of UTC */
    uint64_t lock_wait_ns; /* before a lock counts as never to be had */
    uint64_t native_budget; /* bytes of the native stack that a run may take */
    uint8_t text[64]; /* the text segment */
    uint8_t *record; /* VMEXIT_MAX_PRINT bytes: a print on its way out */
};

/* What one print leaves: a struct vmexit_text (wire.h), then `slots` times 8 bytes; behind the slot of a string, whose value is its length
 * in bytes, these bytes, rounded up to 8. */

/* What a script reaches beyond itself. A null function is one that this host does not have. Those that answer an int say 0 for "done"
 * and otherwise the fault (VMEXIT_FAULT_...). */
struct vmexit_script_host {
    int (*get_register)(struct vmexit_script_context *context, unsigned number, uint64_t *value);
    int (*set_register)(struct vmexit_script_context *context, unsigned number, uint64_t value);
    int (*memory)(struct vmexit_script_context *context, int physical, int write, uint64_t address, void *bytes, uint32_t length);
    int (*to_physical)(struct vmexit_script_context *context, uint64_t address, uint64_t *physical);
    int (*to_virtual)(struct vmexit_script_context *context, uint64_t physical, uint64_t *address);
    int (*print)(struct vmexit_script_context *context, const void *record, uint32_t size);
    int (*short_circuit)(struct vmexit_script_context *context, uint64_t on);
    int (*event)(struct vmexit_script_context *context, unsigned call, uint64_t id); /* VMEXIT_CALL_EVENT_ENABLE ... CLEAR */
    int (*pause)(struct vmexit_script_context *context);
    int (*flush)(struct vmexit_script_context *context);
};

/* A script run in the debugger (script_eval.c): registers and memory as given, virtual addresses are physical ones. */
struct vmexit_eval_memory {
    uint64_t address;
    uint64_t length;
    uint8_t *bytes;
};

struct vmexit_eval {
    uint64_t registers[VMEXIT_SCRIPT_REGISTERS];
    struct vmexit_eval_memory *memory;
    uint64_t memory_count;
    uint8_t *output; /* prints, one behind the other */
    uint64_t output_size;
    uint64_t output_used;
    /* Called with the machine when the output is full: takes what is there; not 0 ends the run. */
    int (*drain)(struct vmexit_eval *eval);
    /* Null, or what reaches a real machine: instead of all that is said above but for the general registers and the output. */
    const struct vmexit_script_host *live;
};

#endif
