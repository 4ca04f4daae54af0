/* An open-loop load generator for one TCP server on 127.0.0.1. What the parts share. See load.c for the rules. */
#ifndef LOAD_H
#define LOAD_H

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <netinet/in.h>

enum cause { REFUSED, RESET, ENDED, TIMEOUT, STATUS, BODY, EXTRA, OTHER, CAUSES };

struct options {
    const char *mode;    /* "http" or "lines" */
    const char *path;    /* http: the path asked for; "?id=" and the request's id are appended */
    int port;            /* of the server, on 127.0.0.1 */
    double rate;         /* http: requests a second; lines: writes a second */
    double seconds;      /* at least this long */
    double timeout;      /* seconds without the whole answer: failed */
    int kept;            /* kept connections */
    int split;           /* http: percent of the requests on kept connections whose head goes out in two writes */
    int gap_ms;          /* ... and the time between the two */
    int until_eof;       /* go on until standard input ends, even after `seconds` */
    uint64_t seed;
};

/* What happened to one class of requests; printed as one JSON object. */
struct stats {
    const char *name;
    uint64_t requests, failed, causes[CAUSES];
    uint64_t opened, reopened, polite;
    uint64_t bytes, bytes_lost, stalled;
    double queued_ms;     /* longest wait for a free kept connection */
    uint32_t *waits;      /* latencies in microseconds, one for each request answered rightly */
    size_t count, room;
};

/* One mode of the generator. `fire` does what was due at `due`; the loop calls it as often as the rate says. */
struct work {
    void (*start)(void);
    void (*fire)(uint64_t due);
    void (*ready)(void *connection, uint32_t events);
    uint64_t (*timers)(uint64_t now);   /* does what is over, returns when to be called again (UINT64_MAX: never) */
    int (*finish)(uint64_t now);        /* after the last fire: 1 once nothing is outstanding */
    void (*report)(FILE *out);
};

extern struct options options;
extern const struct work http_work, lines_work;
extern uint64_t began;

uint64_t now_ns(void);
uint64_t next_random(void);
void die(const char *what);
int open_connection(int *in_progress);                      /* -1: refused at once, errno says why */
void watch(int fd, uint32_t events, void *connection, int again);
void unwatch(int fd);
void answered(struct stats *stats, uint64_t due);
void note_failure(struct stats *stats, enum cause cause, uint64_t since);
enum cause cause_of(int error);
void print_stats(FILE *out, struct stats *stats);

#endif
