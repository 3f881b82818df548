/* Filters of an event by value: what is written or was read, and what the MSR held before. */
#ifndef VMEXIT_FILTER_H
#define VMEXIT_FILTER_H

#include "core.h"

#pragma GCC visibility push(hidden)

static inline bool filter_is_there(const struct vmexit_event *event) { return (event->mask | event->changes) != 0; }
bool filter_is_sound(const struct vmexit_event *event);
/* Before events are used that may have filters. False where memory is short. */
bool filters_prepare(const struct vmexit_event *events, size_t count);
void filters_begin_session(void);
/* Whether an event's filter lets it act at a trap; in stage pre (trap->stage) also whether it may act in the post stage to come. */
bool filter_lets(const struct vmexit_event *event, struct trap *trap, unsigned stage);
/* In stage pre, when every event has acted: the instruction is about to be carried out. */
void filter_note(struct trap *trap);

#pragma GCC visibility pop

#endif
