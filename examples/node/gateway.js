// The gateway's services, made from its protos as they are: nothing is generated.

import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { fileURLToPath } from "node:url";

const PROTOS = process.env.INTERNVL_PROTOS ?? fileURLToPath(new URL("../../protos", import.meta.url));
const FILES = ["chat", "conversation", "media"].map((name) => `internvl_serving/gateway/v1/${name}_service.proto`);
const CHUNK_BYTES = 1 << 20;
// Without the ping timeout a server that hangs is noticed only after a minute.
const OPTIONS = { "grpc.keepalive_time_ms": 10_000, "grpc.keepalive_timeout_ms": 5_000 };

/** A connection to a gateway. A failed call is an Error with gRPC's `code` and, in its metadata, our reason. */
export class Gateway {
  constructor(address, { apiKey = "", ca = "" } = {}) {
    const definition = loader.loadSync(FILES, { includeDirs: [PROTOS], keepCase: false, longs: Number, enums: String });
    const services = grpc.loadPackageDefinition(definition).internvl_serving.gateway.v1;
    const credentials = ca ? grpc.credentials.createSsl(readFileSync(ca)) : grpc.credentials.createInsecure();
    this.metadata = new grpc.Metadata();
    if (apiKey) this.metadata.set("authorization", `Bearer ${apiKey}`);
    this.media = new services.MediaService(address, credentials, OPTIONS);
    this.conversations = new services.ConversationService(address, credentials, OPTIONS);
    this.chats = new services.ChatService(address, credentials, OPTIONS);
  }

  /** Has the gateway hold a picture, unless it does already; returns its digest. */
  async upload(bytes) {
    const digest = createHash("sha256").update(bytes).digest("hex");
    const { missingDigests = [] } = await this.#ask(this.media, "findMissing", { digests: [digest] });
    if (missingDigests.length) await this.#send(digest, bytes);
    return digest;
  }

  /** Begins a dialogue that the gateway keeps; returns its id. */
  async createConversation(systemMessage) {
    const request = systemMessage === undefined ? {} : { systemMessage };
    const { conversation } = await this.#ask(this.conversations, "createConversation", request);
    return conversation.conversationId;
  }

  /** Yields the events of an answer: one `started`, many `delta`, one `finished`. Leaving the loop cancels the call. */
  async *chat(conversationId, parts, generationConfig = {}) {
    const messages = [{ role: "ROLE_USER", parts }];
    const call = this.chats.chat({ conversationId, messages, generationConfig }, this.metadata);
    try {
      yield* call;
    } finally {
      call.cancel();
    }
  }

  close() {
    for (const client of [this.media, this.conversations, this.chats]) client.close();
  }

  #ask(client, method, request) {
    return new Promise((resolve, reject) => {
      client[method](request, this.metadata, (error, response) => (error ? reject(error) : resolve(response)));
    });
  }

  #send(digest, bytes) {
    return new Promise((resolve, reject) => {
      const call = this.media.upload(this.metadata, (error, response) => (error ? reject(error) : resolve(response)));
      call.write({ header: { digest } });
      for (let start = 0; start < bytes.length; start += CHUNK_BYTES) {
        call.write({ chunk: bytes.subarray(start, start + CHUNK_BYTES) });
      }
      call.end();
    });
  }
}
