/*
 * Faults that a test has ordered: finds the one that a call meets, and counts it down.
 *
 * A line of a `faults` file: FUNCTION KEY=VALUE...
 *   FUNCTION   an NVML name with or without its _v2, _v3; a trailing * matches any ending, and after
 *              a leading = only this very name does, as where an old library lacks one version
 *   error=N    the call returns this code
 *   ignore     a set reports success and changes nothing
 *   wide       a process list has entries of 32 bytes where the caller reads 24, as drivers 535.43 to
 *              535.86 write them
 *   claims=N   a process list is answered, and said to hold N entries more than the buffer has
 *   grow=N     a process list that is asked for with a buffer has outgrown it by N
 *   delay_ms=X the call takes so much longer
 *   count=N    the line applies N times, then goes; without it, until the file is cleared
 * The first line that matches applies.
 */
#define _GNU_SOURCE
#include "nvml_sim.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct line {
    char function[96];
    struct fault fault;
    double delay_ms;
    long count; /* -1: for ever */
};

static size_t length_without_version(const char *name)
{
    size_t length = strlen(name);
    bool versioned = length > 3 && strncmp(name + length - 3, "_v", 2) == 0 &&
                     name[length - 1] >= '0' && name[length - 1] <= '9';
    return versioned ? length - 3 : length;
}

static bool matches(const char *pattern, const char *function)
{
    size_t length = strlen(pattern);
    if (pattern[0] == '=')
        return strcmp(pattern + 1, function) == 0;
    if (strncmp(function, "nvmlInit", 8) == 0 && strncmp(pattern, "nvmlInit", 8) == 0)
        return true; /* whichever of its three names a client calls */
    if (length > 0 && pattern[length - 1] == '*')
        return strncmp(pattern, function, length - 1) == 0;
    length = length_without_version(pattern);
    return length == length_without_version(function) && strncmp(pattern, function, length) == 0;
}

static bool parse_word(const char *word, struct line *line)
{
    if (strcmp(word, "ignore") == 0)
        return line->fault.ignore = true;
    if (strcmp(word, "wide") == 0)
        return line->fault.wide = true;
    return sscanf(word, "error=%d", &line->fault.error) == 1 ||
           sscanf(word, "grow=%u", &line->fault.grow) == 1 ||
           sscanf(word, "claims=%u", &line->fault.claims) == 1 ||
           sscanf(word, "delay_ms=%lf", &line->delay_ms) == 1 ||
           sscanf(word, "count=%ld", &line->count) == 1;
}

/* A line with a slip of the pen must not let a test pass as if nothing had been ordered. */
static struct line parse_line(const char *begin, size_t length)
{
    char text[256], *rest;
    struct line line = {.count = -1};
    snprintf(text, sizeof text, "%.*s", (int)length, begin);
    char *word = strtok_r(text, " \t", &rest);
    snprintf(line.function, sizeof line.function, "%s", word ? word : "");
    while (word != NULL && (word = strtok_r(NULL, " \t", &rest)) != NULL)
        if (!parse_word(word, &line)) {
            fprintf(stderr, "simulated NVML: bad fault: %.*s\n", (int)length, begin);
            line.fault.error = NVML_ERROR_UNKNOWN;
        }
    return line;
}

/* Returns where the line that applies begins, or NULL. */
static char *find(char *text, const char *function, bool has_buffer, struct line *line)
{
    for (char *begin = text; *begin != '\0';) {
        size_t length = strcspn(begin, "\n");
        *line = parse_line(begin, length);
        bool waits_for_buffer = line->fault.grow + line->fault.claims > 0 && !has_buffer;
        if (matches(line->function, function) && line->count != 0 && !waits_for_buffer)
            return begin;
        begin += length + (begin[length] == '\n');
    }
    return NULL;
}

/* Replaces the line by itself with one less to go, or by nothing. */
static void count_down(const char *folder, const char *text, const char *begin,
                       const struct line *line)
{
    char changed[MAX_TEXT + 128], one[512] = "";
    const char *after = begin + strcspn(begin, "\n");
    if (line->count > 1) {
        int length = snprintf(one, sizeof one, "%s count=%ld delay_ms=%g", line->function,
                              line->count - 1, line->delay_ms);
        if (line->fault.error != NVML_SUCCESS)
            length += snprintf(one + length, 32, " error=%d", line->fault.error);
        if (line->fault.grow > 0)
            length += snprintf(one + length, 32, " grow=%u", line->fault.grow);
        if (line->fault.claims > 0)
            length += snprintf(one + length, 32, " claims=%u", line->fault.claims);
        snprintf(one + length, 16, "%s%s\n", line->fault.ignore ? " ignore" : "",
                 line->fault.wide ? " wide" : "");
    }
    snprintf(changed, sizeof changed, "%.*s%s%s", (int)(begin - text), text, one,
             *after == '\n' ? after + 1 : after);
    if (write_temporary(folder, "faults", changed))
        publish_temporary(folder, "faults");
}

struct fault faults_take(const char *folder, const char *function, bool has_buffer)
{
    char text[MAX_TEXT], path[MAX_PATH];
    struct line line;
    const struct fault none = {.error = NVML_SUCCESS};
    snprintf(path, sizeof path, "%s/faults", folder);
    if (!read_text(path, text, sizeof text) || !find(text, function, has_buffer, &line))
        return none;
    if (line.count > 0) {
        int lock = lock_folder(folder);
        char *begin = read_text(path, text, sizeof text) ? find(text, function, has_buffer, &line)
                                                         : NULL;
        if (begin != NULL && line.count > 0)
            count_down(folder, text, begin, &line);
        if (lock >= 0)
            close(lock);
        if (begin == NULL)
            return none;
    }
    if (line.delay_ms > 0)
        sleep_us((unsigned long long)(line.delay_ms * 1000));
    return line.fault;
}
