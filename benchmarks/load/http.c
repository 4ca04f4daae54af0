/* HTTP: half of the requests on new connections, half on kept ones.

   New: one connection, one request with "Connection: close"; the client closes once it has the whole answer.
   Kept: `kept` slots taken in turn, each with at most one request outstanding. Nobody looks at an idle connection.
   When its next request is due, the client looks once (as every pool does):
     - the server's end (FIN or RST) has arrived already: `reopened`, the request goes out on a new connection;
     - the last answer said "Connection: close": `polite`, the same;
     - otherwise the request is sent, and if its whole, right answer does not come, it has `failed`.
   A right answer is status 200 with a Content-Length and the request's id, a newline behind it, as the body. */
#define _GNU_SOURCE
#include "load.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

enum state { IDLE, CONNECTING, WAITING };

struct connection {
    int fd, kept, closing;                   /* fd -1: not open. closing: the server said it would close */
    enum state state;
    uint64_t due, since, over;               /* request due; connection opened; request timed out, in ns */
    uint64_t rest_at;                        /* when the second half of the head goes out; 0: none */
    char id[17], head[512], answer[4096];
    size_t size, sent, got;
    struct connection *next;                 /* in the list of idle slots, or of scrapped connections */
    struct connection *before, *after;       /* in the list of running requests, oldest first */
};

static struct stats fresh = {.name = "new"}, kept = {.name = "kept"};
static struct connection *idle_first, *idle_last, *running_first, *running_last, *scrapped;
static uint64_t *queue;                      /* due times of requests that wait for a free slot */
static size_t queue_first, queue_count, queue_room, splits;

static struct stats *stats_of(struct connection *c) { return c->kept ? &kept : &fresh; }

static void make_idle(struct connection *c) {
    c->state = IDLE;
    c->next = NULL;
    if (idle_last) idle_last->next = c;
    else idle_first = c;
    idle_last = c;
}

static void run_list_add(struct connection *c) {
    c->before = running_last;
    c->after = NULL;
    if (running_last) running_last->after = c;
    else running_first = c;
    running_last = c;
}

static void run_list_remove(struct connection *c) {
    if (c->before) c->before->after = c->after;
    else running_first = c->after;
    if (c->after) c->after->before = c->before;
    else running_last = c->before;
}

static void drop(struct connection *c) {
    if (c->fd >= 0) close(c->fd);
    c->fd = -1;
}

/* The request is over. Scrapped connections are freed after the events at hand, which may still point at them. */
static void done(struct connection *c) {
    run_list_remove(c);
    if (c->rest_at) splits--;
    c->rest_at = 0;
    if (c->kept) {
        make_idle(c);
        return;
    }
    drop(c);
    c->state = IDLE;
    c->next = scrapped;
    scrapped = c;
}

static void failed(struct connection *c, enum cause cause) {
    note_failure(stats_of(c), cause, c->since);
    drop(c);
    done(c);
}

static void send_now(struct connection *c) {
    size_t until = c->rest_at ? c->size / 2 : c->size;
    while (c->sent < until) {
        ssize_t n = send(c->fd, c->head + c->sent, until - c->sent, MSG_NOSIGNAL);
        if (n < 0) {
            failed(c, cause_of(errno));
            return;
        }
        c->sent += (size_t)n;
    }
}

static void connected(struct connection *c) {
    c->state = WAITING;
    watch(c->fd, EPOLLIN, c, 1);
    send_now(c);
}

static void dial(struct connection *c) {
    int in_progress;
    c->since = now_ns();
    c->closing = 0;
    c->fd = open_connection(&in_progress);
    stats_of(c)->opened++;
    if (c->fd < 0) {
        failed(c, cause_of(errno));
        return;
    }
    c->state = in_progress ? CONNECTING : WAITING;
    watch(c->fd, in_progress ? EPOLLOUT : EPOLLIN, c, 0);
    if (!in_progress) send_now(c);
}

/* 1: the connection of an idle slot can take a request, as far as the client can know. */
static int usable(struct connection *c) {
    char scrap;
    if (c->fd < 0) return 0;
    if (c->closing) {
        kept.polite++;
        drop(c);
        return 0;
    }
    if (recv(c->fd, &scrap, 1, MSG_PEEK | MSG_DONTWAIT) < 0 && errno == EAGAIN) return 1;
    kept.reopened++;
    drop(c);
    return 0;
}

static void begin(struct connection *c, uint64_t due) {
    uint64_t now = now_ns();
    c->due = due;
    c->over = now + (uint64_t)(options.timeout * 1e9);
    c->sent = c->got = 0;
    snprintf(c->id, sizeof c->id, "%016lx", next_random());
    c->size = (size_t)snprintf(c->head, sizeof c->head, "GET %s?id=%s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\n%s\r\n",
                               options.path, c->id, options.port, c->kept ? "" : "Connection: close\r\n");
    stats_of(c)->requests++;
    run_list_add(c);
    c->state = WAITING;
    if (c->kept && options.split && next_random() % 100 < (uint64_t)options.split) {
        c->rest_at = now + (uint64_t)options.gap_ms * 1000000u;
        c->due += (uint64_t)options.gap_ms * 1000000u; /* the wait that the client itself asked for does not count */
        splits++;
    }
    if (c->kept && usable(c)) send_now(c);
    else dial(c);
}

static void enqueue(uint64_t due) {
    if (queue_first + queue_count == queue_room) {
        memmove(queue, queue + queue_first, queue_count * sizeof *queue);
        queue_first = 0;
        if (queue_count * 2 >= queue_room) {
            queue_room = queue_room ? queue_room * 2 : 1024;
            if (!(queue = realloc(queue, queue_room * sizeof *queue))) die("realloc");
        }
    }
    queue[queue_first + queue_count++] = due;
}

static void serve_queue(void) {
    while (queue_count && idle_first) {
        struct connection *c = idle_first;
        if (!(idle_first = c->next)) idle_last = NULL;
        uint64_t due = queue[queue_first++];
        queue_count--;
        double waited = (double)(now_ns() - due) / 1e6;
        if (waited > kept.queued_ms) kept.queued_ms = waited;
        begin(c, due);
    }
}

static void free_scrapped(void) {
    while (scrapped) {
        struct connection *c = scrapped;
        scrapped = c->next;
        free(c);
    }
}

static struct connection *new_connection(int is_kept) {
    struct connection *c = calloc(1, sizeof *c);
    if (!c) die("calloc");
    c->fd = -1;
    c->kept = is_kept;
    return c;
}

static void start(void) {
    for (int i = 0; i < options.kept; i++) make_idle(new_connection(1));
}

static void fire(uint64_t due) {
    static int turn;
    free_scrapped();
    if (turn++ % 2) begin(new_connection(0), due);
    else enqueue(due);
    serve_queue();
}

static const char *header(const char *head, const char *end, const char *name) {
    size_t size = strlen(name);
    for (const char *line = strstr(head, "\r\n"); line && line < end; line = strstr(line + 2, "\r\n"))
        if (!strncasecmp(line + 2, name, size) && line[2 + size] == ':') {
            const char *value = line + 3 + size;
            return value + strspn(value, " \t");
        }
    return NULL;
}

/* What came so far: -1 incomplete, CAUSES right and complete, otherwise what is wrong with it. */
static int judge(struct connection *c) {
    c->answer[c->got] = 0;
    char *end = strstr(c->answer, "\r\n\r\n");
    if (!end) return c->got + 1 >= sizeof c->answer ? STATUS : -1;
    if (strncmp(c->answer, "HTTP/1.1 200", 12)) return STATUS;
    const char *length = header(c->answer, end, "content-length"), *connection = header(c->answer, end, "connection");
    size_t wanted = length ? strtoul(length, NULL, 10) : 0, have = c->got - (size_t)(end + 4 - c->answer);
    if (wanted != 17) return BODY;
    if (have < wanted) return -1;
    if (have > wanted) return EXTRA;
    if (memcmp(end + 4, c->id, 16) || end[4 + 16] != '\n') return BODY;
    c->closing = connection && !strncasecmp(connection, "close", 5);
    return CAUSES;
}

static void receive(struct connection *c) {
    ssize_t n = recv(c->fd, c->answer + c->got, sizeof c->answer - 1 - c->got, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n <= 0) {
        failed(c, n == 0 ? ENDED : cause_of(errno));
        return;
    }
    c->got += (size_t)n;
    int verdict = judge(c);
    if (verdict < 0) return;
    if (verdict == CAUSES && c->sent == c->size) {
        answered(stats_of(c), c->due);
        done(c);
    } else
        failed(c, verdict == CAUSES ? EXTRA : (enum cause)verdict);
}

static void ready(void *at, uint32_t events) {
    struct connection *c = at;
    if (c->state == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) failed(c, cause_of(error));
        else connected(c);
    } else if (c->state == WAITING)
        receive(c);
    else if (c->fd >= 0)
        unwatch(c->fd); /* idle: the client looks only when its next request is due; `usable` will see what came */
    (void)events;
}

static void send_rests(uint64_t now, uint64_t *next) {
    struct connection *after;
    for (struct connection *c = running_first; c && splits; c = after) {
        after = c->after;
        if (!c->rest_at || c->state != WAITING) continue;
        if (c->rest_at > now) {
            if (c->rest_at < *next) *next = c->rest_at;
            continue;
        }
        c->rest_at = 0;
        splits--;
        send_now(c);
    }
}

static uint64_t timers(uint64_t now) {
    uint64_t next = UINT64_MAX;
    free_scrapped();
    while (running_first && running_first->over <= now) failed(running_first, TIMEOUT);
    if (running_first) next = running_first->over;
    if (splits) send_rests(now, &next);
    serve_queue();
    return next;
}

static int finish(uint64_t now) {
    (void)now;
    return !running_first && !queue_count;
}

/* Both classes together, for loads whose halves are too small to be told apart. */
static struct stats together(void) {
    struct stats all = kept;
    all.name = "all";
    all.requests += fresh.requests;
    all.failed += fresh.failed;
    all.opened += fresh.opened;
    for (int i = 0; i < CAUSES; i++) all.causes[i] += fresh.causes[i];
    if (!(all.waits = malloc((kept.count + fresh.count + 1) * sizeof *all.waits))) die("malloc");
    if (kept.count) memcpy(all.waits, kept.waits, kept.count * sizeof *all.waits);
    if (fresh.count) memcpy(all.waits + kept.count, fresh.waits, fresh.count * sizeof *all.waits);
    all.count = kept.count + fresh.count;
    return all;
}

static void report(FILE *out) {
    struct stats all = together();
    print_stats(out, &fresh);
    fprintf(out, ", ");
    print_stats(out, &kept);
    fprintf(out, ", ");
    print_stats(out, &all);
}

const struct work http_work = {start, fire, ready, timers, finish, report};
