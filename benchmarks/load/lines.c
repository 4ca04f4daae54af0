/* Lines over kept TCP connections, against a server that keeps state for each connection (examples/line_server.py).

   A line is "NUMBER PAYLOAD\n", numbers from 1 on each connection. The server answers each with "COUNT LINE\n": how many
   lines this connection has sent, and the line itself. So one byte lost, doubled or out of order makes an answer wrong,
   and so does a count lost on the way. At the end the client shuts its side down and expects the server's end, nothing
   before it: one answer too many is seen as well.
   Each due time one connection, in turn, writes a piece of random size, which mostly ends inside a line.
   `requests` are lines written whole. A line fails when its right answer does not come; the connection is then dropped,
   what else was outstanding on it fails too, and `bytes_lost` grows by all bytes written since its last right answer. */
#define _GNU_SOURCE
#include "load.h"

#include <errno.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define PENDING 512   /* lines outstanding on one connection; a power of two */
#define LONGEST 200    /* bytes of a line */

struct pending {
    uint64_t due, end;                                      /* end: bytes of the stream up to the line's end */
    char line[LONGEST + 1];                                 /* without its newline */
};

struct line_connection {
    int fd, connecting, ending;
    uint64_t since, ended, number, written, verified;       /* lines begun; bytes written; bytes answered rightly */
    uint64_t oldest, newest;                                /* pending lines: oldest <= i < newest */
    char line[LONGEST + 1], answer[1024];
    size_t size, sent, got;                                 /* of the current line */
    struct pending pending[PENDING];
};

static struct stats lines = {.name = "lines"};
static struct line_connection **all;

static void dial(struct line_connection *c) {
    memset(c, 0, offsetof(struct line_connection, pending));
    c->since = now_ns();
    c->fd = open_connection(&c->connecting);
    lines.opened++;
    if (c->fd >= 0) watch(c->fd, c->connecting ? EPOLLOUT : EPOLLIN, c, 0);
    else note_failure(&lines, cause_of(errno), 0);
}

/* Everything unanswered on the connection has failed, at least one. The next due time opens it anew. */
static void lost(struct line_connection *c, enum cause cause) {
    uint64_t unanswered = c->newest - c->oldest;
    if (unanswered == 0) unanswered = 1;
    while (unanswered--) note_failure(&lines, cause, c->since);
    lines.bytes_lost += c->written - c->verified;
    close(c->fd);
    c->fd = -1;
}

static void next_line(struct line_connection *c) {
    static const char letters[] = "abcdefghijklmnopqrstuvwxyz0123456789";
    c->size = (size_t)snprintf(c->line, sizeof c->line, "%lu ", ++c->number);
    for (size_t more = 8 + next_random() % 120; more && c->size < LONGEST - 1; more--)
        c->line[c->size++] = letters[next_random() % 36];
    c->line[c->size++] = '\n';
    c->sent = 0;
}

static void line_written(struct line_connection *c, uint64_t due) {
    struct pending *p = &c->pending[c->newest++ % PENDING];
    p->due = due;
    p->end = c->written;
    memcpy(p->line, c->line, c->size - 1);
    p->line[c->size - 1] = 0;
    lines.requests++;
}

/* Writes up to `budget` bytes of the stream; with `to_end` only to the end of the line that was begun. */
static void write_piece(struct line_connection *c, size_t budget, uint64_t due, int to_end) {
    while (budget) {
        if (c->sent == c->size) {
            if (to_end || c->newest - c->oldest >= PENDING) return;
            next_line(c);
        }
        size_t part = c->size - c->sent < budget ? c->size - c->sent : budget;
        ssize_t n = send(c->fd, c->line + c->sent, part, MSG_NOSIGNAL);
        if (n < 0 && errno == EAGAIN) {
            lines.stalled++;
            return;
        }
        if (n < 0) {
            lost(c, cause_of(errno));
            return;
        }
        c->sent += (size_t)n;
        c->written += (size_t)n;
        lines.bytes += (uint64_t)n;
        budget -= (size_t)n;
        if (c->sent == c->size) line_written(c, due);
    }
}

static void start(void) {
    if (!(all = calloc((size_t)options.kept, sizeof *all))) die("calloc");
    for (int i = 0; i < options.kept; i++) {
        if (!(all[i] = malloc(sizeof **all))) die("malloc");
        dial(all[i]);
    }
}

static void fire(uint64_t due) {
    static int turn;
    struct line_connection *c = all[turn++ % options.kept];
    if (c->fd < 0) dial(c);
    if (c->fd >= 0 && !c->connecting) write_piece(c, 1 + next_random() % 160, due, 0);
}

/* One answer without its newline; 0 when it is the right one. */
static int check_answer(struct line_connection *c, const char *text) {
    char wanted[LONGEST + 32];
    if (c->oldest == c->newest) return -1;
    struct pending *p = &c->pending[c->oldest % PENDING];
    snprintf(wanted, sizeof wanted, "%lu %s", c->oldest + 1, p->line);
    if (strcmp(text, wanted)) {
        fprintf(stderr, "load: answer \"%s\", not \"%s\"\n", text, wanted);
        return -1;
    }
    c->oldest++;
    c->verified = p->end;
    answered(&lines, p->due);
    return 0;
}

static void check_answers(struct line_connection *c) {
    char *newline, *from = c->answer;
    while ((newline = memchr(from, '\n', c->got - (size_t)(from - c->answer)))) {
        *newline = 0;
        if (check_answer(c, from)) {
            lost(c, c->oldest == c->newest ? EXTRA : BODY);
            return;
        }
        from = newline + 1;
    }
    c->got -= (size_t)(from - c->answer);
    memmove(c->answer, from, c->got);
    if (c->got == sizeof c->answer) lost(c, BODY);
}

static void finish_connect(struct line_connection *c) {
    int error = 0;
    socklen_t size = sizeof error;
    getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        lost(c, cause_of(error));
        return;
    }
    c->connecting = 0;
    watch(c->fd, EPOLLIN, c, 1);
}

static void ready(void *at, uint32_t events) {
    struct line_connection *c = at;
    (void)events;
    if (c->fd < 0) return;
    if (c->connecting) {
        finish_connect(c);
        return;
    }
    ssize_t n = recv(c->fd, c->answer + c->got, sizeof c->answer - c->got, 0);
    if (n < 0 && errno == EAGAIN) return;
    if (n == 0 && c->ending) {
        close(c->fd);
        c->fd = -1;
        return;
    }
    if (n <= 0) {
        lost(c, n == 0 ? ENDED : cause_of(errno)); /* nobody asked the server to close: a lost connection */
        return;
    }
    c->got += (size_t)n;
    check_answers(c);
}

/* Since when the server owes something on this connection; `now` if it owes nothing. */
static uint64_t owed_since(struct line_connection *c, uint64_t now) {
    if (c->newest > c->oldest) return c->pending[c->oldest % PENDING].due;
    return c->connecting ? c->since : c->ending ? c->ended : now;
}

static uint64_t timers(uint64_t now) {
    static uint64_t looked;
    if (now - looked < 50000000u) return looked + 50000000u;
    looked = now;
    for (int i = 0; i < options.kept; i++) {
        struct line_connection *c = all[i];
        uint64_t since = c->fd < 0 ? now : owed_since(c, now);
        if (now > since && (double)(now - since) / 1e9 > options.timeout) lost(c, TIMEOUT);
    }
    return now + 50000000u;
}

static void end(struct line_connection *c, uint64_t now) {
    if (!c->connecting && c->sent < c->size) write_piece(c, LONGEST, now, 1);
    if (c->fd < 0 || c->ending || c->connecting || c->sent < c->size || c->oldest != c->newest) return;
    c->ending = 1;
    c->ended = now;
    shutdown(c->fd, SHUT_WR);
}

static int finish(uint64_t now) {
    int open = 0;
    for (int i = 0; i < options.kept; i++) {
        if (all[i]->fd >= 0) end(all[i], now);
        open |= all[i]->fd >= 0;
    }
    return !open;
}

static void report(FILE *out) { print_stats(out, &lines); }

const struct work lines_work = {start, fire, ready, timers, finish, report};
