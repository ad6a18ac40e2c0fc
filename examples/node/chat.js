// Asks about a picture, and then once more: node chat.js ADDRESS PICTURE [QUESTION...]

import { readFile } from "node:fs/promises";
import { Gateway } from "./gateway.js";

const [address, picture, ...asked] = process.argv.slice(2);
if (!picture) {
  console.error("usage: node chat.js HOST:PORT PICTURE [QUESTION...]");
  process.exit(2);
}
const questions = asked.length ? asked : ["What is in the picture?", "Say that in one word."];

const gateway = new Gateway(address, { apiKey: process.env.INTERNVL_API_KEY, ca: process.env.INTERNVL_TLS_CA });
try {
  const digest = await gateway.upload(await readFile(picture));
  const conversation = await gateway.createConversation();
  for (const [turn, question] of questions.entries()) {
    console.log(`> ${question}`);
    // The second turn needs no picture: the conversation holds it.
    const parts = [...(turn === 0 ? [{ media: { digest } }] : []), { text: question }];
    for await (const { delta, finished } of gateway.chat(conversation, parts, { maxOutputTokens: 64 })) {
      if (delta) process.stdout.write(delta.text ?? "");
      if (finished) report(finished);
    }
  }
} catch (error) {
  console.error(`failed: ${error.details ?? error.message}`);
  process.exitCode = 1;
} finally {
  gateway.close();
}

function report({ usage, receipts = [] }) {
  const { promptTokenCount = 0, cachedTokenCount = 0, outputTokenCount = 0 } = usage;
  console.log(`\n  ${promptTokenCount} tokens read, ${cachedTokenCount} of them cached, ${outputTokenCount} written`);
  for (const { tileCount, cacheTier = "CACHE_TIER_UNSPECIFIED" } of receipts) {
    const from = cacheTier === "CACHE_TIER_NONE" ? "encoded now" : `found in a cache (${cacheTier.slice(11).toLowerCase()})`;
    console.log(`  picture: ${tileCount} tiles, ${from}`);
  }
}
