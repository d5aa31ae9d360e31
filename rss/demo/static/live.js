// Says so on the page when its session has ended elsewhere, and when the server is away.
"use strict";

const ended = document.getElementById("ended");
const away = document.getElementById("away");

function listen() {
  const socket = new WebSocket(location.origin.replace(/^http/, "ws") + "/live");
  socket.onopen = () => { away.hidden = true; };
  socket.onmessage = (event) => {
    socket.onclose = null;
    ended.querySelector("p").textContent = JSON.parse(event.data).notice;
    ended.hidden = false;
    document.getElementById("who").textContent = "You are signed out.";
    for (const form of document.querySelectorAll("form")) form.remove();
  };
  socket.onclose = () => {
    away.hidden = false;
    setTimeout(listen, 2000);
  };
}

listen();
