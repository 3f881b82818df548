/* Everything that the agent and the debugger share: limits, shared memory and control messages.
 *
 * The agent includes this file; the debugger reads the same text with cffi. It therefore holds plain structs of fixed-width
 * integers and "#define NAME number" only, and every struct is laid out without padding.
 *
 * A link has two parts. The control socket (SOCK_SEQPACKET, one struct vmexit_message a datagram) carries what is asked and
 * answered now and then. The shared memory (a sealed memfd) carries what happens at every trap: one ring of records a vCPU,
 * written by that vCPU's thread alone and read by the debugger alone, ordered among each other by a global sequence number.
 */
#ifndef VMEXIT_WIRE_H
#define VMEXIT_WIRE_H

#include <stdint.h>

#define VMEXIT_WIRE_MAGIC 0x74697865
#define VMEXIT_WIRE_VERSION 5

#define VMEXIT_MAX_EVENTS 256
#define VMEXIT_MAX_RANGES 16
#define VMEXIT_MAX_TRANSFER 4096
#define VMEXIT_MAX_BUFFER 0x1000000 /* bytes of an event's buffer */
#define VMEXIT_MAX_EVENT_ID 0xffff
#define VMEXIT_ALL_CORES 0xffffffff
#define VMEXIT_ALL_PROCESSES 0xffffffff

/* What a guest does: vmexit_event.access (a set), vmexit_record.access (one of them). */
#define VMEXIT_WRMSR 1
#define VMEXIT_RDMSR 2

/* When: vmexit_event.stages (a set), vmexit_record.stage (one of them). */
#define VMEXIT_PRE 1
#define VMEXIT_POST 2

/* What an event does: vmexit_event.actions (a set), vmexit_record.action (one of them). */
#define VMEXIT_RECORD 1
#define VMEXIT_ASK 2
#define VMEXIT_BREAK 4
#define VMEXIT_SCRIPT 8
/* What only stands in a record: a script has printed, its run was ended, a thread was seen. */
#define VMEXIT_PRINT 16
#define VMEXIT_FAULT 32
#define VMEXIT_NAME 64 /* the name of a thread whose number later records of this vCPU carry */
#define VMEXIT_CALLER 128 /* its value is the address that its `caller` stands for, also in later records of this vCPU */

/* vmexit_event.flags */
#define VMEXIT_ENABLED 1
#define VMEXIT_SHORT_CIRCUIT 2
#define VMEXIT_IMMEDIATE 4
#define VMEXIT_WITH_PROCESS 8 /* its records and its script are to tell the guest's process and thread, and its records the caller, where they are known */
#define VMEXIT_ASK_FIRST 16 /* with VMEXIT_ASK: before the script, which runs if the answer says so; it decides on short-circuiting, too */

/* vmexit_record.flags */
#define VMEXIT_SKIPPED 1
#define VMEXIT_INTERRUPTED 2
#define VMEXIT_FAULTED 4 /* the processor or KVM refused the access (#GP); only tracepoints tell of such, an agent has no post stage then */
#define VMEXIT_PROCESS_KNOWN 8 /* vmexit_record.process and .thread are those of the guest */
#define VMEXIT_CALLER_GUESSED 32 /* vmexit_record.caller only looks as if it were that */
#define VMEXIT_AGAIN 16 /* of a question: the event has left a record of this trap before, or has asked already */

/* vmexit_ring.waiting */
#define VMEXIT_WAITS_FOR_ROOM 1
#define VMEXIT_WAITS_FOR_ANSWER 2

/* Registers, in the order of the instruction encoding; the first 18 are what a question (VMEXIT_ASK) carries. */
#define VMEXIT_RAX 0
#define VMEXIT_RCX 1
#define VMEXIT_RDX 2
#define VMEXIT_RBX 3
#define VMEXIT_RSP 4
#define VMEXIT_RBP 5
#define VMEXIT_RSI 6
#define VMEXIT_RDI 7
#define VMEXIT_RIP 16
#define VMEXIT_RFLAGS 17
#define VMEXIT_ASKED_REGISTERS 18
#define VMEXIT_CS 18
#define VMEXIT_SS 19
#define VMEXIT_DS 20
#define VMEXIT_ES 21
#define VMEXIT_FS 22
#define VMEXIT_GS 23
#define VMEXIT_FS_BASE 24
#define VMEXIT_GS_BASE 25
#define VMEXIT_KERNEL_GS_BASE 26
#define VMEXIT_CR0 27
#define VMEXIT_CR2 28
#define VMEXIT_CR3 29
#define VMEXIT_CR4 30
#define VMEXIT_CR8 31
#define VMEXIT_EFER 32
#define VMEXIT_REGISTERS 33

/* What the agent can do here: vmexit_hello.capabilities. */
#define VMEXIT_CAN_RECORD 1
#define VMEXIT_CAN_READ 2
#define VMEXIT_CAN_MODIFY 4
#define VMEXIT_CAN_SKIP 8
#define VMEXIT_CAN_POST 16
#define VMEXIT_CAN_BREAK 32
#define VMEXIT_CAN_MEMORY 64
#define VMEXIT_CAN_MEMORY_WRITE 128
#define VMEXIT_CAN_HALT 32768 /* the agent halts the machine itself (VMEXIT_HALT) */

struct vmexit_range {
    uint32_t first;
    uint32_t last; /* inclusive */
};

struct vmexit_event {
    uint32_t id; /* rises in the order in which events were made, up to VMEXIT_MAX_EVENT_ID; never given twice, but for 0: the debugger's
                  * own, before all others */
    uint32_t slot; /* where its hits are counted, below VMEXIT_MAX_EVENTS */
    uint8_t access;
    uint8_t stages;
    uint8_t actions;
    uint8_t flags;
    uint32_t core; /* a vCPU's index or VMEXIT_ALL_CORES */
    uint32_t range_count;
    uint32_t script; /* what VMEXIT_SCRIPT runs: the number that it was added with (VMEXIT_ADD_SCRIPT); else 0 */
    uint32_t condition; /* a script that runs first: the event acts if that leaves RAX other than 0, and nothing else of it stays; or 0 */
    uint32_t process; /* of the guest, or VMEXIT_ALL_PROCESSES: as long as it is not known which one runs, no other is matched. Of the
                       * host, where the target merely looks on */
    struct vmexit_range ranges[VMEXIT_MAX_RANGES];
    /* Only what differs from `value` in no bit of `mask`, and what differs from the MSR's value of before in any bit of `changes`. A
     * read has a value only in stage post, and changes nothing. */
    uint64_t value;
    uint64_t mask; /* 0: whatever the value */
    uint64_t changes; /* 0: whatever was there before */
};

struct vmexit_record {
    uint64_t sequence; /* 0, 1, 2 ... without a gap over all rings */
    uint64_t time_ns; /* the host's CLOCK_MONOTONIC */
    uint64_t rip; /* of the WRMSR or RDMSR itself, in both stages */
    uint64_t rsp;
    uint64_t value; /* EDX:EAX */
    uint32_t msr; /* ECX */
    uint16_t event; /* vmexit_event.id */
    uint16_t vcpu;
    uint8_t access;
    uint8_t stage;
    uint8_t action;
    uint8_t flags;
    uint8_t length; /* of the instruction, in bytes; 0: not known yet (KVM, stage pre) */
    uint8_t reserved;
    uint16_t caller; /* where the function that the instruction is in returns to: the number of an address (VMEXIT_CALLER); 0: not known */
    union {
        uint32_t process; /* the guest's number of it, with VMEXIT_PROCESS_KNOWN; else 0 */
        uint32_t script; /* with VMEXIT_PRINT and VMEXIT_FAULT: whose */
    };
    union {
        uint32_t thread; /* as process */
        uint32_t text; /* with VMEXIT_PRINT, VMEXIT_FAULT, VMEXIT_NAME: where that begins in the ring's text, in words of 8 bytes, modulo 2^32 */
    };
};

/* What is left in the text of a vCPU's ring: this, then with VMEXIT_PRINT the slots (script.h), with VMEXIT_FAULT two words: the number
 * of the place in the source, and the address or number to blame; with VMEXIT_NAME VMEXIT_NAME_BYTES, and the record's value is the number
 * of the process << 32 | that of the thread. */
struct vmexit_text {
    uint32_t size; /* of all of it, in bytes, a multiple of 8 */
    uint32_t number; /* of the format, or of the fault (script.h) */
};

/* A question that a vCPU has stopped for, and its answer. The vCPU fills it, publishes a record with action VMEXIT_ASK and
 * sleeps until answered == asked. */
struct vmexit_question {
    uint64_t asked; /* the record's sequence + 1; 0: nothing is asked */
    uint64_t answered;
    uint64_t registers[VMEXIT_ASKED_REGISTERS];
    uint32_t changed; /* answer: bit n = the debugger changed registers[n] */
    uint8_t skip; /* answer: 0 or 1, the short-circuit state from here on */
    uint8_t halt; /* answer: 1 = halt the machine here, as VMEXIT_BREAK does */
    uint8_t script; /* answer, with VMEXIT_ASK_FIRST: 1 = run the event's script now */
    uint8_t again; /* answer, with VMEXIT_ASK_FIRST: 1 = then ask again */
};

struct vmexit_ring {
    uint64_t head; /* records written; the agent's */
    uint64_t dropped; /* records that found no room (overflow policy drop); the agent's */
    uint64_t waits; /* times that the vCPU had to wait for room; the agent's */
    uint64_t urgent; /* head behind the last record that the debugger should see at once; the agent's */
    uint64_t text_head; /* words of text written; the agent's */
    uint64_t agent_line[3];
    uint64_t tail; /* records read; the debugger's */
    uint64_t text_tail; /* words of text that are no longer needed; the debugger's */
    uint64_t debugger_line[6];
    uint64_t waiting; /* why the vCPU sleeps on its eventfd, or 0; the agent's */
    uint64_t waiting_line[7];
    struct vmexit_question question;
    uint64_t question_line[3];
    uint64_t hits[VMEXIT_MAX_EVENTS]; /* of each event on this vCPU, by vmexit_event.slot; the agent's */
};

struct vmexit_shared {
    uint32_t magic;
    uint32_t version;
    uint32_t vcpus; /* rings that follow */
    uint32_t ring_records; /* records a ring holds, a power of two */
    uint64_t records_offset; /* of the first ring's records from the start of the shared memory, in bytes */
    uint64_t size; /* of the shared memory, in bytes */
    uint64_t text_offset; /* of the first ring's text */
    uint64_t globals_offset; /* of the scripts' global variables, VMEXIT_MAX_GLOBALS words; the agent's and the debugger's */
    uint32_t ring_words; /* words of text a ring holds, a power of two */
    uint32_t reserved;
    uint64_t changes; /* times that a script has enabled, disabled or cleared an event; the agent's */
    uint64_t sleeping; /* 1: the debugger sleeps and wants its eventfd written; the debugger's */
    uint64_t sleeping_line[7];
    uint8_t states[VMEXIT_MAX_EVENTS]; /* by vmexit_event.slot: what scripts have made of the events (VMEXIT_STATE_...); the agent's */
};

/* vmexit_shared.states; anything else: as the debugger has set it. */
#define VMEXIT_STATE_ENABLED 1
#define VMEXIT_STATE_DISABLED 2
#define VMEXIT_STATE_CLEARED 3

/* Control messages. The debugger asks, the agent answers each with the same type and serial, status 0 or an error. */
#define VMEXIT_HELLO 1 /* -> struct vmexit_hello, with the memfd and the debugger's eventfd attached */
#define VMEXIT_EVENTS 2 /* struct vmexit_event[count], address = vmexit_shared.changes as known: replaces all events; rising ids */
#define VMEXIT_OVERFLOW 3 /* argument 0: a full ring makes the vCPU wait; 1: drops and counts */
#define VMEXIT_HOLD 4 /* argument 1: the debugger keeps the machine halted; if the link breaks, the agent resumes it */
#define VMEXIT_DECIDE 5 /* vcpu, argument 1 or 0: short-circuit the execution that this vCPU is stopped before, or not */
#define VMEXIT_GET_REGISTERS 6 /* vcpu -> uint64_t[VMEXIT_REGISTERS] */
#define VMEXIT_SET_REGISTER 7 /* vcpu, argument = register (these, or one of script.h), address = value */
#define VMEXIT_READ_VIRTUAL 8 /* vcpu, address, argument = bytes -> bytes */
#define VMEXIT_READ_PHYSICAL 9
#define VMEXIT_WRITE_VIRTUAL 10 /* vcpu, address, bytes behind the header */
#define VMEXIT_WRITE_PHYSICAL 11
#define VMEXIT_ADD_SCRIPT 12 /* struct vmexit_script_file, the file (and that of $buffer) attached; forgotten unless the next VMEXIT_EVENTS names it */
#define VMEXIT_SCRIPT_LIMITS 13 /* address = steps, argument = bytes of the native stack that a run may take */
#define VMEXIT_READ_MSR 14 /* vcpu, argument = MSR -> uint64_t */
#define VMEXIT_WRITE_MSR 15 /* vcpu, argument = MSR, address = value */
#define VMEXIT_GET_REGISTER 16 /* vcpu, argument = register (these, or one of script.h) -> uint64_t */
#define VMEXIT_TRANSLATE 17 /* vcpu, argument 0: virtual address -> physical, 1: the other way -> uint64_t */
#define VMEXIT_SET_RECIPE 18 /* struct vmexit_recipe and its bases: how to find the current thread; nothing at all: not known any more */
#define VMEXIT_SET_CODE 19 /* struct vmexit_frames and struct vmexit_code[count]: how to find callers; nothing at all: not known any more */
#define VMEXIT_HALT 32 /* argument 1: halt the machine; 0: let it run. VMEXIT_MACHINE follows when it does */
/* Notices of the agent, with serial 0. */
#define VMEXIT_VCPU 64 /* vcpu has come up; its eventfd is attached */
#define VMEXIT_MACHINE 65 /* argument 1: the machine runs; 0: it is halted. Ends the greeting, and comes whenever it changes */

/* vmexit_message.status */
#define VMEXIT_OK 0
#define VMEXIT_REFUSED 1 /* malformed: wrong size, unknown type, value out of range */
#define VMEXIT_BUSY 2 /* another debugger holds the link */
#define VMEXIT_RUNNING 3 /* the vCPU runs; halt the machine first */
#define VMEXIT_UNREADABLE 4 /* the address is not mapped */
#define VMEXIT_UNAVAILABLE 5 /* this VMM does not let the agent do it */
#define VMEXIT_WRONG_VERSION 6
#define VMEXIT_STALE 7 /* scripts have changed events since (vmexit_shared.changes): look, and ask again */
#define VMEXIT_NO_MSR 8 /* the vCPU has no such MSR, or none that can be read or written from outside */
#define VMEXIT_NO_VALUE 9 /* the MSR does not take this value: WRMSR would fault */

struct vmexit_message {
    uint32_t magic;
    uint16_t type;
    uint16_t status;
    uint64_t serial;
    uint32_t vcpu;
    uint32_t argument;
    uint64_t address;
    uint32_t length; /* of what follows, in bytes */
    uint32_t reserved;
};

/* A compiled script (script.h) is a file in memory, sealed against writing: its code, then from the next page on its constants. */
struct vmexit_script_file {
    uint32_t script; /* its number: never 0, never given twice */
    uint32_t entry; /* offset in the code */
    uint32_t code_size; /* in bytes */
    uint32_t constants_size;
    uint32_t buffer_size; /* of $buffer, whose file, sealed against shrinking, is attached too; 0: there is none */
};

/* The way from a vCPU's registers to the thread that it executes: which words of the guest's memory to read, each at an address that an
 * earlier one gave, and what it has to be. Where one cannot be read or is not that, the thread is not known.
 *
 * It begins at the CPU's own area, which GS leads to: by GS_BASE in the kernel, by KERNEL_GS_BASE in a program, by either of them in the
 * few instructions between. A program may give its own GS any value; so an area counts only if it is among `bases`. Where both count, it
 * is the one whose thread has the stack that RSP points into. */
#define VMEXIT_MAX_STEPS 16
#define VMEXIT_MAX_BASES 4096
#define VMEXIT_NAME_BYTES 16

/* What a step finds (vmexit_step.result), and what a later one starts from (vmexit_step.source). */
#define VMEXIT_FOUND_BASE 0 /* given, not found: the CPU's own area */
#define VMEXIT_FOUND_THREAD 1 /* its address; as $thread */
#define VMEXIT_FOUND_PROCESS 2 /* its address; as $proc */
#define VMEXIT_FOUND_TID 3
#define VMEXIT_FOUND_PID 4 /* there has to be one */
#define VMEXIT_FOUND_NAME 5 /* at most VMEXIT_NAME_BYTES; no step starts from it */
#define VMEXIT_FOUND_STACK 6 /* the lowest address of the thread's kernel stack */
#define VMEXIT_FOUND_PEB 7
#define VMEXIT_FOUND_TEB 8
#define VMEXIT_FOUND_OTHER 9 /* this and what follows are for the recipe's own use */
#define VMEXIT_FOUNDS 16

/* vmexit_step.check */
#define VMEXIT_CHECK_NONE 0
#define VMEXIT_CHECK_POINTER 1 /* in the upper half, a multiple of 8, and not of the last page */
#define VMEXIT_CHECK_POINTER_OR_NULL 2
#define VMEXIT_CHECK_MOST 3 /* at most `operand` */
#define VMEXIT_CHECK_SAME 4 /* what the source was plus `operand` */

struct vmexit_step {
    uint64_t offset; /* of what is read, from the source's value, modulo 2^64 */
    uint64_t operand;
    uint8_t result; /* found by no other step */
    uint8_t source; /* found by an earlier one */
    uint8_t size; /* in bytes: 1, 2, 4 or 8; a name's is 1 to VMEXIT_NAME_BYTES */
    uint8_t check;
    uint32_t reserved;
};

struct vmexit_recipe {
    uint64_t root; /* physical address of the page tables that map all of it, whatever a vCPU's CR3 is */
    uint32_t levels; /* of them, 4 or 5 */
    uint32_t stack_bytes; /* of a thread's kernel stack, where a step finds that; else 0 */
    uint32_t step_count;
    uint32_t base_count; /* uint64_t each behind this struct, none 0, rising; 0: any address in the upper half counts */
    struct vmexit_step steps[VMEXIT_MAX_STEPS];
};

/* How to find where a function of the guest's kernel returns to. Each piece of its code has, or has not, a table in the guest's memory that
 * says where the return address lies at each instruction, as Linux keeps them for itself (ORC): `count` times 4 bytes, rising, each the
 * place of an instruction relative to its own; and as many entries of 6 bytes, each for the instructions from there on. An entry begins
 * with a signed offset of 2 bytes, from the register that the lowest 4 bits of its last 2 bytes tell; their bits 8 to 10 are its kind.
 * The return address lies 8 bytes below. All of it is read by the page tables of the recipe (VMEXIT_SET_RECIPE). */
#define VMEXIT_MAX_CODES 1024

struct vmexit_code {
    uint64_t first;
    uint64_t last; /* inclusive, and before the next one's first */
    uint64_t places; /* the address of the places of instructions */
    uint64_t entries;
    uint32_t count; /* 0: there is no table, and all that can be told of a caller is a guess */
    uint32_t reserved;
};

struct vmexit_frames {
    uint8_t rsp; /* in an entry: this is the register */
    uint8_t rbp;
    uint8_t call; /* the kind of a frame that a call has made */
    uint8_t frame_pointers; /* 1: code without a table keeps them in RBP */
    uint32_t count; /* of the pieces of code that follow, at most VMEXIT_MAX_CODES */
};

struct vmexit_hello {
    uint32_t version;
    uint32_t capabilities;
    uint32_t vcpus; /* rings */
    uint32_t plugin_api; /* the VMM's QEMU plugin API version; 0: not a plugin */
    uint64_t sequence; /* of the first record that this debugger will see */
    char door[16];
};

#endif
