// Says so on the page when its session has ended elsewhere.
"use strict";

const ended = document.getElementById("ended");

function listen() {
  const socket = new WebSocket(location.origin.replace(/^http/, "ws") + "/live");
  socket.onmessage = (event) => {
    socket.onclose = null;
    ended.querySelector("p").textContent = JSON.parse(event.data).notice;
    ended.hidden = false;
    for (const button of document.querySelectorAll("button")) button.disabled = true;
  };
  socket.onclose = () => setTimeout(listen, 2000);
}

listen();
