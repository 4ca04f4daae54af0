/* The clock, the loop, the figures and the report of the load generator. http.c and lines.c hold the two modes.

   Open loop: request i is due at a random point of the i-th interval of 1/rate seconds, whatever the server does.
   Latency counts from the time it was due, so a server that stalls cannot hide the requests that had to wait.
   "late_ms" says how late the generator itself was: the time between due and the moment the loop got to it.
   Clients never retry. One JSON object on standard output at the end; nothing else is printed there. */
#define _GNU_SOURCE
#include "load.h"

#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define SHOWN 40 /* failures listed one by one */

static const char *const CAUSE_NAMES[CAUSES] = {
    "refused", "reset", "ended", "timeout", "status", "body", "extra", "other",
};

struct options options = {
    .mode = "http", .path = "/", .rate = 2000, .seconds = 10, .timeout = 10, .kept = 64, .gap_ms = 5, .seed = 1,
};
uint64_t began;
static int poller;
static struct sockaddr_in server = {.sin_family = AF_INET};
static struct stats lateness = {.name = "late"};
static double worst_late_ms;
static struct { double at; const char *class; enum cause cause; double age; } shown[SHOWN];
static int shown_count;

uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

uint64_t next_random(void) { /* splitmix64 */
    static uint64_t state;
    if (state == 0) state = options.seed * 0x9e3779b97f4a7c15u;
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

void die(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

int open_connection(int *in_progress) {
    int on = 1, fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    if (fd < 0) die("socket");
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    *in_progress = 0;
    if (connect(fd, (struct sockaddr *)&server, sizeof server) == 0) return fd;
    if (errno == EINPROGRESS) {
        *in_progress = 1;
        return fd;
    }
    int error = errno;
    close(fd);
    errno = error;
    return -1;
}

void watch(int fd, uint32_t events, void *connection, int again) {
    struct epoll_event event = {.events = events, .data.ptr = connection};
    if (epoll_ctl(poller, again ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fd, &event) < 0) die("epoll_ctl");
}

void unwatch(int fd) {
    if (epoll_ctl(poller, EPOLL_CTL_DEL, fd, NULL) < 0) die("epoll_ctl");
}

static void add_wait(struct stats *stats, uint64_t ns) {
    if (stats->count == stats->room) {
        stats->room = stats->room ? stats->room * 2 : 4096;
        stats->waits = realloc(stats->waits, stats->room * sizeof *stats->waits);
        if (!stats->waits) die("realloc");
    }
    stats->waits[stats->count++] = (uint32_t)(ns / 1000);
}

void answered(struct stats *stats, uint64_t due) {
    uint64_t now = now_ns();
    add_wait(stats, now > due ? now - due : 0);
}

enum cause cause_of(int error) {
    return error == ECONNREFUSED ? REFUSED : error == ECONNRESET || error == EPIPE ? RESET
         : error == ETIMEDOUT ? TIMEOUT : OTHER;
}

/* `since`: when the connection was opened, for the list of single failures. */
void note_failure(struct stats *stats, enum cause cause, uint64_t since) {
    stats->failed++;
    stats->causes[cause]++;
    if (shown_count < SHOWN) {
        uint64_t now = now_ns();
        shown[shown_count].at = (double)(now - began) / 1e9;
        shown[shown_count].class = stats->name;
        shown[shown_count].cause = cause;
        shown[shown_count++].age = since ? (double)(now - since) / 1e9 : 0;
    }
}

static int ascending(const void *a, const void *b) {
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static double part_ms(struct stats *stats, double part) { /* `waits` must be sorted */
    if (stats->count == 0) return 0;
    size_t at = (size_t)(part * (double)stats->count);
    return stats->waits[at < stats->count ? at : stats->count - 1] / 1000.0;
}

void print_stats(FILE *out, struct stats *s) {
    if (s->count) qsort(s->waits, s->count, sizeof *s->waits, ascending);
    fprintf(out, "\"%s\": {\"requests\": %lu, \"failed\": %lu, \"answered\": %zu, \"causes\": {", s->name, s->requests,
            s->failed, s->count);
    for (int i = 0, first = 1; i < CAUSES; i++)
        if (s->causes[i]) {
            fprintf(out, "%s\"%s\": %lu", first ? "" : ", ", CAUSE_NAMES[i], s->causes[i]);
            first = 0;
        }
    fprintf(out, "}, \"p50_ms\": %.3f, \"p99_ms\": %.3f, \"worst_ms\": %.3f, \"opened\": %lu, \"reopened\": %lu, "
            "\"polite\": %lu, \"queued_ms\": %.3f, \"bytes\": %lu, \"bytes_lost\": %lu, \"stalled\": %lu}",
            part_ms(s, 0.5), part_ms(s, 0.99), part_ms(s, 1), s->opened, s->reopened, s->polite, s->queued_ms,
            s->bytes, s->bytes_lost, s->stalled);
}

static void report(const struct work *work, double seconds) {
    if (lateness.count) qsort(lateness.waits, lateness.count, sizeof *lateness.waits, ascending);
    printf("{\"mode\": \"%s\", \"seconds\": %.3f, \"rate\": %.1f, \"late_ms\": %.3f, \"late_p99_ms\": %.3f, ",
           options.mode, seconds, (double)lateness.count / seconds, worst_late_ms, part_ms(&lateness, 0.99));
    work->report(stdout);
    printf(", \"failures\": [");
    for (int i = 0; i < shown_count; i++)
        printf("%s{\"at_s\": %.3f, \"class\": \"%s\", \"cause\": \"%s\", \"age_s\": %.3f}", i ? ", " : "", shown[i].at,
               shown[i].class, CAUSE_NAMES[shown[i].cause], shown[i].age);
    printf("]}\n");
}

static int input_ended(void) {
    struct pollfd input = {.fd = 0, .events = POLLIN};
    char scrap[64];
    return poll(&input, 1, 0) == 1 && read(0, scrap, sizeof scrap) <= 0;
}

static void wait_and_dispatch(const struct work *work, uint64_t until) {
    struct epoll_event events[256];
    uint64_t now = now_ns(), wait = until > now ? until - now : 0;
    if (wait > 100000000u) wait = 100000000u; /* look at standard input now and then */
    struct timespec limit = {.tv_sec = 0, .tv_nsec = (long)wait};
    int count = epoll_pwait2(poller, events, 256, &limit, NULL);
    if (count < 0 && errno != EINTR) die("epoll_pwait2");
    for (int i = 0; i < count; i++) work->ready(events[i].data.ptr, events[i].events);
}

static uint64_t due_time(uint64_t number) {
    double jitter = (double)(next_random() >> 11) / 9007199254740992.0;
    return began + (uint64_t)(((double)number + jitter) / options.rate * 1e9);
}

static void fire_due(const struct work *work, uint64_t *number, uint64_t *due) {
    /* Only so many at once: answers must be read meanwhile, or a busy moment would grow its own latency. */
    for (int burst = 0; burst < 16; burst++) {
        uint64_t now = now_ns();
        if (*due > now) return;
        double late = (double)(now - *due) / 1e6;
        if (late > worst_late_ms) worst_late_ms = late;
        add_wait(&lateness, now - *due);
        work->fire(*due);
        *due = due_time(++*number);
    }
}

static void run(const struct work *work) {
    work->start();
    began = now_ns();
    uint64_t end = began + (uint64_t)(options.seconds * 1e9), number = 0, due = due_time(0), looked = 0;
    int ended = !options.until_eof, firing = 1;
    double seconds = 0;
    for (;;) {
        uint64_t now = now_ns(), next = work->timers(now);
        if (!ended && now - looked > 50000000u) {
            ended = input_ended();
            looked = now;
        }
        if (firing && now >= end && ended) {
            firing = 0;
            seconds = (double)(now - began) / 1e9;
        }
        if (firing) fire_due(work, &number, &due);
        else if (work->finish(now)) break;
        if (firing && due < next) next = due;
        wait_and_dispatch(work, next);
    }
    report(work, seconds);
}

static void read_options(int argc, char **argv) {
    for (int i = 1; i < argc; i++) {
        const char *name = argv[i], *value = i + 1 < argc ? argv[i + 1] : "";
        if (!strcmp(name, "--until-eof")) {
            options.until_eof = 1;
            continue;
        }
        i++;
        if (!strcmp(name, "--mode")) options.mode = value;
        else if (!strcmp(name, "--path")) options.path = value;
        else if (!strcmp(name, "--port")) options.port = atoi(value);
        else if (!strcmp(name, "--rate")) options.rate = atof(value);
        else if (!strcmp(name, "--seconds")) options.seconds = atof(value);
        else if (!strcmp(name, "--timeout")) options.timeout = atof(value);
        else if (!strcmp(name, "--kept")) options.kept = atoi(value);
        else if (!strcmp(name, "--split")) options.split = atoi(value);
        else if (!strcmp(name, "--gap-ms")) options.gap_ms = atoi(value);
        else if (!strcmp(name, "--seed")) options.seed = strtoull(value, NULL, 10);
        else {
            fprintf(stderr, "load: %s: no such option\n", name);
            exit(2);
        }
    }
}

int main(int argc, char **argv) {
    read_options(argc, argv);
    int lines = !strcmp(options.mode, "lines");
    if ((!lines && strcmp(options.mode, "http")) || options.port <= 0 || options.port > 65535 || options.kept < 1 ||
        options.rate <= 0 || options.seed == 0 || strlen(options.path) > 200) {
        fprintf(stderr, "load: give --port 1..65535, --mode http or lines, --rate, --kept and --seed above 0, "
                        "--path of at most 200 bytes\n");
        return 2;
    }
    signal(SIGPIPE, SIG_IGN);
    setpriority(PRIO_PROCESS, 0, -10); /* where allowed: the clients are not what is measured */
    server.sin_port = htons((uint16_t)options.port);
    server.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if ((poller = epoll_create1(EPOLL_CLOEXEC)) < 0) die("epoll_create1");
    run(lines ? &lines_work : &http_work);
    return 0;
}
