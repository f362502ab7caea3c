/* The driver inside a process that uses CUDA, and what callers of the checkpoint API see of it. */
#ifndef STANDIN_DRIVER_H
#define STANDIN_DRIVER_H

#include "world.h"

#include <signal.h>
#include <stddef.h>

#define MAILBOX_MAGIC 0x5357415053455256ull
#define WAKE (SIGRTMIN + 11)

struct pair {
    uint8_t from[16], to[16];
};

/* What goes wrong in the target; `world.h` has the names. */
enum trouble { NO_TROUBLE, TIMES_OUT, BREAKS, NO_ROOM, HANGS, DIES, LINGERS };

struct request {
    int op, trouble, code, host_pid;
    unsigned timeout_ms, pairs;
    double seconds; /* of waiting, before it is done; of lingering */
    struct pair pair[MAX_GPUS];
};

/* Lives in the target's memory, so an image of the process carries it. Callers read and write it with
 * process_vm_readv and process_vm_writev, which need the right to trace the target, as the driver
 * does; then they wake the driver's thread with a signal that only this thread waits for. */
struct mailbox {
    uint64_t magic, asked, answered;
    uint32_t state, contexts, bricked, half; /* half: a call that DIES has come half way */
    int32_t result;
    char owner[OWNER_NAME];
    struct request request;
};

extern struct mailbox standin_mailbox;

/* driver.c, for target.c */
struct allocation {
    struct allocation *next;
    uint64_t address, bytes;
    int gpu, fd;     /* fd: its bytes on the GPU, -1 while checkpointed */
    uint8_t *host;   /* its bytes in host memory while checkpointed */
};

extern struct allocation *standin_allocations;
extern unsigned standin_contexts[MAX_GPUS]; /* by the machine's numbers of GPUs */
extern int standin_visible[MAX_GPUS], standin_visible_count;
extern bool standin_initialized;

bool gate_close(unsigned timeout_ms); /* wait for calls in flight and keep new ones out */
void gate_wake(void);                 /* the state has changed: those who wait look again */
int owner_claim(const struct config *config, uint64_t need[MAX_GPUS]); /* new bytes, or OOM */
void owner_drop(void);
void owner_note(const char *state);
void owner_needs(const struct config *config, uint64_t need[MAX_GPUS]); /* of all that it has */
extern int standin_restored, standin_host_pid;
int vram_open(uint64_t bytes);
bool device_open(void);
void device_close(void);
bool driver_thread_start(void);

#endif
