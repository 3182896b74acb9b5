/* Consume with librabbitmq, one multiple ack for a batch, and print a reading as protocol.py has it. */

#if defined(__has_include) && __has_include(<rabbitmq-c/amqp.h>)
#include <rabbitmq-c/amqp.h>
#include <rabbitmq-c/tcp_socket.h>
#else /* before 0.12 */
#include <amqp.h>
#include <amqp_tcp_socket.h>
#endif
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static void want(int is_good, const char *what) {
  if (!is_good) {
    fprintf(stderr, "%s failed\n", what);
    exit(1);
  }
}

static double seconds(clockid_t clock) {
  struct timespec now;
  clock_gettime(clock, &now);
  return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

static long peak_rss(void) {
  char line[256];
  long kilobytes = 0;
  FILE *status = fopen("/proc/self/status", "r");
  while (status != NULL && fgets(line, sizeof line, status) != NULL) {
    sscanf(line, "VmHWM: %ld", &kilobytes);
  }
  if (status != NULL) {
    fclose(status);
  }
  return kilobytes * 1024;
}

int main(int argc, char **argv) {
  want(argc == 8, "the command line");
  const char *host = argv[1], *queue = argv[2];
  int port = atoi(argv[3]), prefetch = atoi(argv[4]), batch = atoi(argv[5]);
  long warmup = atol(argv[6]), messages = atol(argv[7]);

  amqp_connection_state_t connection = amqp_new_connection();
  amqp_socket_t *socket = amqp_tcp_socket_new(connection);
  want(socket != NULL, "making a socket");
  want(amqp_socket_open(socket, host, port) == AMQP_STATUS_OK, "connecting");
  amqp_rpc_reply_t reply =
      amqp_login(connection, "/", 0, 131072, 0, AMQP_SASL_METHOD_PLAIN, "guest", "guest");
  want(reply.reply_type == AMQP_RESPONSE_NORMAL, "logging in");
  want(amqp_channel_open(connection, 1) != NULL, "opening a channel");
  want(amqp_basic_qos(connection, 1, 0, (uint16_t)prefetch, 0) != NULL, "basic.qos");
  want(amqp_basic_consume(connection, 1, amqp_cstring_bytes(queue), amqp_empty_bytes, 0, 0, 0,
                          amqp_empty_table) != NULL,
       "basic.consume");

  long seen = 0, began = -1, rss = 0;
  size_t size = 0;
  int unacked = 0;
  double cpu = 0, wall = 0;
  for (;;) {
    amqp_envelope_t envelope;
    amqp_maybe_release_buffers(connection);
    reply = amqp_consume_message(connection, &envelope, NULL, 0);
    want(reply.reply_type == AMQP_RESPONSE_NORMAL, "receiving");
    uint64_t tag = envelope.delivery_tag;
    size += envelope.message.body.len;
    amqp_destroy_envelope(&envelope);
    if (++unacked < batch) {
      continue;
    }
    seen += unacked;
    unacked = 0;
    want(amqp_basic_ack(connection, 1, tag, 1) == AMQP_STATUS_OK, "basic.ack");
    if (began < 0 && seen >= warmup) {
      began = seen;
      rss = peak_rss();
      cpu = seconds(CLOCK_PROCESS_CPUTIME_ID);
      wall = seconds(CLOCK_MONOTONIC);
    } else if (began >= 0 && seen - began >= messages) {
      break;
    }
  }
  cpu = seconds(CLOCK_PROCESS_CPUTIME_ID) - cpu;
  wall = seconds(CLOCK_MONOTONIC) - wall;
  want(size > 0, "reading bodies");
  printf("{\"messages\": %ld, \"cpu\": %.6f, \"seconds\": %.6f, \"rss\": %ld, \"peak_rss\": %ld,"
         " \"versions\": {\"librabbitmq\": \"%s\"}}\n",
         seen - began, cpu, wall, rss, peak_rss(), amqp_version());
  amqp_channel_close(connection, 1, AMQP_REPLY_SUCCESS);
  amqp_connection_close(connection, AMQP_REPLY_SUCCESS);
  amqp_destroy_connection(connection);
  return 0;
}
